"""Who owes what: task leases, the staleness bound, order and loss, as a pure state machine.

No clock, no socket, no MLX. Imported by `learner.online` and `learner.build`.
"""

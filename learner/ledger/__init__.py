"""The state of every task: leases, the staleness bound and the order of batches.

A pure state machine without clock, socket or MLX, and the journal that its events are written to.
Imported by `learner.online` and `learner.build`.
"""

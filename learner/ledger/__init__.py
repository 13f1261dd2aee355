"""The state of every task: leases, the staleness bound and the order of batches.

A pure state machine without clock, socket or MLX. Imported by `learner.online` and `learner.build`.
"""

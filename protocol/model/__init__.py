"""The policy as learner and actors both know it: loading, adapters, digests, snapshots.

Loads MLX, so only code that holds a model imports it; imports `protocol.config` for its settings.
"""

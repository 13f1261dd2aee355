"""The model that learner and actors share: loading, adapters, digests, snapshots of its weights.

This is the only room of `protocol` that loads MLX. It imports `protocol.config`.
"""

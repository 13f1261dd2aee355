"""A run's settings: each key with its type, bounds and meaning, read from TOML and flags, checked.

Nothing here loads MLX. It imports `protocol.errors` and `protocol.hosts`; every package may import
it.
"""

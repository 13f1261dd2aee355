"""A run's settings: every key with its rule, read from TOML and flags, checked, and explained.

Nothing here loads MLX. It imports `protocol.errors` alone; every package may import it.
"""

"""Rewards: user functions in a process that can be killed, a server before it, a client to ask it.

Nothing here loads MLX, and nothing else of `actors` is imported here.
"""

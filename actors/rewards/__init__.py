"""Rewards: a client asks a server, which runs user functions in a process that it can kill.

It neither loads MLX nor imports the rest of `actors`; programs in `launch` import it.
"""

"""How messages travel: sockets and their guards, the in-memory channel, the bridge between threads.

Nothing here loads MLX. It imports `protocol.messages`; every package may import it.
"""

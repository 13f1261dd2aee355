"""How messages travel: sockets with their limits and keys, and the bridge between two threads.

Nothing here loads MLX. It imports `protocol.messages`; every package may import it.
"""

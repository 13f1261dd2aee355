"""What processes say to each other: the messages, their parts, and how they become bytes.

Nothing here loads MLX. Imported by every package, and by `protocol.transport`.
"""

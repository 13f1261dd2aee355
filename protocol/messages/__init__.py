"""What processes say to each other: messages, their parts, and their encoding as bytes.

Start with `messages.py`. Nothing here loads MLX; every package may import it.
"""

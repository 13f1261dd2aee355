"""Dataset rows to prompts and examples: opened, prepared, tokenized, filtered, ordered, resumed.

Nothing here loads MLX. Imported by every room that works on prompts or examples.
"""

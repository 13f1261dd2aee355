"""Dataset rows to prompts and examples: opened, prepared, tokenised, filtered, ordered, resumed.

Nothing here loads MLX. Imported by every room that works on prompts or examples.
"""

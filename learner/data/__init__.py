"""Dataset rows to prompts and examples: opened, prepared, tokenised, filtered, ordered, resumed.

Nothing here loads MLX. Any room that works on prompts or examples may import it.
"""

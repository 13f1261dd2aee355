"""Sampling: many completions at once over one mlx-lm model, keyed and with exact log-probs.

`base` is the interface, which loads no MLX; the worker drives an engine through it.
"""

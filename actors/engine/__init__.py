"""Samples completions: many at once over one mlx-lm model, with keyed random numbers and log-probs.

`base` is the interface and loads no MLX; the worker drives an engine through it. Imported by the
rest of `actors` and by the programs in `launch`.
"""

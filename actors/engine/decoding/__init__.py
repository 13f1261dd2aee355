"""Decodes many completions at once: slots, or mlx-lm's own caches, and one draw per step.

`decoder` is the interface, `choose_decoder` picks an implementation by a trial. Imported by
`actors.engine`, of which it imports nothing.
"""

"""The front doors: one file per program, and rooms for what runs and shows a run.

Nothing imports it but itself.
"""

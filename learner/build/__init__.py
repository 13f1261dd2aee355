"""Puts a learner together from a run's settings.

Imported by `launch`; it imports every other room.
"""

"""Puts a learner together from a run's settings, to begin a run, continue it or replay it.

Imported by `launch`; it imports every other room.
"""

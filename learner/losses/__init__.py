"""Losses and their metrics, equal to TRL 1.16.0's: pure functions of arrays.

They know no model and no batch. Imported by `learner.objectives` and by whoever merges metrics.
"""

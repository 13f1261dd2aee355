"""Losses and their metrics, equal to TRL 1.16.0's: pure functions of arrays.

They know nothing of models and batches. Imported by `learner.objectives`, and for merging metrics
by the trainer and the evaluator.
"""

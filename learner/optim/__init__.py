"""The optimiser step: gradients of micro-batches added up, clipped, and applied by AdamW.

Imported by the trainer and `learner.build`.
"""

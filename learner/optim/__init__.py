"""The optimiser step: gradients of micro-batches are summed, clipped and applied by AdamW.

Imported by `learner.trainer` and `learner.build`; imports `learner.model`.
"""

"""What the learner does with a model: log-probs, memory, the shared prompt, the reference.

Imported by `learner.objectives`, `learner.offline`, `learner.optim` and `learner.build`; imports
nothing else of the learner.
"""

"""What the learner does with a model: log-probs, memory, the shared prompt, the reference.

Imported by objectives, the optimiser step and `learner.build`.
"""

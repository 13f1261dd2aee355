"""What is optimised: experience to arrays, arrays to a loss and metrics.

Imported by `learner.offline` and by `learner.build`, which chooses one; the trainer knows them by
`learner.interfaces` alone.
"""

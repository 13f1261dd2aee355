"""What is optimised: experience to arrays, arrays to a loss and metrics.

The trainer knows them by `learner.interfaces` alone; `learner.build` chooses one.
"""

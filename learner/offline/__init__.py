"""Experience from datasets: batches of examples, held-out evaluation, reference log-probs.

Imported by `learner.build` and by programs that read finished runs.
"""

"""Experience from actors: leasing prompts, receiving groups, and handing batches to the trainer.

Imported by the GRPO objective, which works on groups, and by `learner.build`.
"""

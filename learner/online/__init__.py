"""Experience from actors: the conversation with them, their groups, and the trainer's end of it.

Imported by the GRPO objective, which works on groups, and by `learner.build`.
"""

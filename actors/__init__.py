"""Makes experience: samples completions and has them scored.

It imports only `protocol`; only `launch` imports it.

worker    the main thread: drives the engine, acts on what the session decides
session   the conversation with the learner, as a state machine without sockets or MLX
io        the I/O thread: the learner's socket, reward servers, snapshots
engine/   samples completions          rewards/  runs reward functions
"""

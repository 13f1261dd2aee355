"""A run's result for other programs: fused into its base, as GGUF, with an Ollama Modelfile.

Imports no other room of launch; only `launch/export.py` imports it.
"""

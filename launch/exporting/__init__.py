"""A run's result as other programs take it: fused, as GGUF, with an Ollama Modelfile."""

"""The run folder on disk: making it, resolving a recipe's paths, resuming, reading files that grow.

Every other room of launch may import it; it imports none of them.
"""

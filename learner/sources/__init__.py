"""Where batches come from: datasets (offline, prompts) and actors (online)."""

"""What a run keeps on disk: its settings, its records, and reading them while they grow."""

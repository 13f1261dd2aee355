"""Makes experience: samples completions and has them scored. It imports `protocol` alone."""

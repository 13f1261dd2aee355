"""What a person sees of runs: the display, the report, the comparison."""

"""What a person sees of runs: the display, the report, the comparison.

Imports run_folder only; `cli` and the programs import it.
"""

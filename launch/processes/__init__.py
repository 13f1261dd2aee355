"""The processes of a run: the programs that only a launcher starts, and what keeps them running.

Imports run_folder only; `cli` and the programs import it.
"""

"""Turns experience into weights: sources, objectives, the step, the ledger.

It imports `protocol` alone; `launch` imports it.
"""

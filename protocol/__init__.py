"""The agreement: everything that two processes must both know.

It imports nothing local; every package may import it.
"""

"""The programs, one file each, and rooms for what runs a run and shows it.

Nothing outside launch imports it.
"""

"""What the programs share: reading a command line, and running the processes to their end.

The programs import it; it imports run_folder, processes and pages.
"""

"""The processes of a run: started, watched, stopped, and what each does first."""

"""What the front doors share: reading a command line, and seeing a run through to its end."""

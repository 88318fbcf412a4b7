"""The terminal: what is asked on the command line, what is printed, which exit code."""

"""What is wrong: on this machine, in a log, with a model and images; and what to type now."""

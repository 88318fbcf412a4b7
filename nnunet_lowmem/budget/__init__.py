"""Bytes in, plan out: what a case takes, what the machine has, and the ladder when memory is gone."""

"""Tiles in, slabs of final logits out: the rolling window."""

"""Slabs of logits in, labels and probabilities out: how a voxel gets its label."""

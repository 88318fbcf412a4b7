"""Voxels to the network's image, bit-equal to stock: reading, checks, crop, normalisation, spline."""

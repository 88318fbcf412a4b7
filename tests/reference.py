"""Slow twins of the fast paths, as close to stock nnU-Net's own calls as can be."""

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg


def resample(logits, shape, separate_axis=None):
    """Stock's resampling of half logits (heads, z, y, x) with order 1, order_z 0."""
    return resample_data_or_seg(
        logits, shape, is_seg=False, axis=separate_axis, order=1, do_separate_z=separate_axis is not None, order_z=0
    )


def argmax_labels(logits):
    return logits.argmax(0)


def region_labels(logits, order):
    probabilities = 1.0 / (1.0 + np.exp(-logits.astype(np.float32)))
    labels = np.zeros(logits.shape[1:], np.uint16)
    for region, value in enumerate(order):
        labels[probabilities[region] > 0.5] = value
    return labels

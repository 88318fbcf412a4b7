"""IEEE half-precision numbers for compiled CPU code.

numba has no float16 on the CPU, so arrays of halves are handled as their ``uint16`` bits and converted by the functions
below, which agree with IEEE 754 on all 65,536 halves and round to nearest, ties to even. A *key* is an integer that
orders halves as their values do.
"""

from __future__ import annotations

import numpy as np

from nnunet_lowmem.system.compiler import jit


@jit
def half_to_single(bits: np.uint16) -> np.float32:
    """Value of a half, given as its 16 bits, as float32 (exact)."""
    magnitude = np.uint32((bits & 0x7FFF) << 13)
    sign = np.uint32((bits & 0x8000) << 16)
    exponent = np.uint32(magnitude & 0x0F800000)
    subnormal = np.float32(np.uint32(magnitude + (113 << 23)).view(np.float32) - np.float32(2.0**-14))
    result = np.uint32(magnitude + (112 << 23))
    if exponent == np.uint32(0x0F800000):
        result = np.uint32(magnitude + (224 << 23))
    if exponent == np.uint32(0):
        result = np.float32(subnormal).view(np.uint32)
    return np.uint32(result | sign).view(np.float32)


@jit
def single_to_half(value: np.float32) -> np.uint16:
    """Bits of the half nearest to a float32, ties to even."""
    bits = np.float32(value).view(np.uint32)
    sign = np.uint32((bits >> 16) & 0x8000)
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    # adding 0.5 puts the last bit of a subnormal half at the last bit of the float32, so the addition rounds
    subnormal = np.float32(np.uint32(magnitude).view(np.float32) + np.float32(0.5))
    result = np.uint32(np.uint32(magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13)
    if magnitude < np.uint32(113 << 23):
        result = np.uint32(np.float32(subnormal).view(np.uint32) - 0x3F000000)
    if magnitude >= np.uint32(0x47800000):
        result = np.uint32(0x7C00)
    if magnitude > np.uint32(0x7F800000):
        result = np.uint32(0x7E00)
    return np.uint16(result | sign)


@jit
def half_key(bits: np.uint16) -> np.int16:
    """Integer that orders halves as their values do; both zeros give 0."""
    sign = np.int16(np.int16(bits) >> 15)
    return np.int16(np.int16(np.int16(bits & 0x7FFF) ^ sign) - sign)


@jit
def double_to_half_key(value: np.float64) -> np.int16:
    """`half_key` of the half nearest to a finite float64, rounded once, ties to even."""
    bits = np.float64(value).view(np.int64)
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    if magnitude < (1009 << 52):
        key = np.int64(np.rint(abs(value) * 16777216.0))
    else:
        key = ((magnitude + 0x1FFFFFFFFFF + ((magnitude >> 42) & 1)) >> 42) - (1008 << 10)
    return np.int16(-key if bits < 0 else key)


@jit
def key_to_double(key: np.int16) -> np.float64:
    """Value of a key as float64 (exact)."""
    return np.float64(half_to_single(key_to_half(key)))


@jit
def key_to_half(key: np.int16) -> np.uint16:
    """Bits of the half with that key; a zero is positive."""
    return np.uint16(-key | 0x8000 if key < 0 else key)

"""float16 in numba, which has no such type on a CPU."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_REBIAS = np.float32(2.0**112)  # float32's exponent bias less float16's, as a factor


def half_bits(tensor: Tensor) -> NDArray[np.uint16]:
    """The bits of a contiguous float16 tensor, without a copy."""
    bits: NDArray[np.uint16] = tensor.view(torch.int16).numpy().view(np.uint16)
    return bits


@numba.njit(cache=True, inline="never")
def halves_to_floats(source, scratch, out):  # type: ignore[no-untyped-def]
    """out[i] = float of the float16 bits source[i], exact for finite values, subnormal ones too.

    scratch: uint32, as long as source.
    """
    for i in range(source.shape[0]):
        h = np.uint32(source[i])
        scratch[i] = ((h & np.uint32(0x7FFF)) << np.uint32(13)) | (
            (h & np.uint32(0x8000)) << np.uint32(16)
        )
    values = scratch.view(np.float32)
    for i in range(source.shape[0]):
        out[i] = values[i] * _REBIAS

"""What every op needs around a kernel launch: pointers, the stream, and argument checks."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

SUPPORTED_HEAD_DIMS = (64, 80, 96, 128, 256)
VECTOR_BYTES = 16  # kernels move rows in vectors of this size
ROW_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # RowDtype in csrc/common.cuh


def has_kernels() -> bool:
    """Whether the compiled module has CUDA kernels."""
    from twilight_engine import _C

    return _C.has_cuda


def kernels() -> ModuleType:
    """The compiled module, or RuntimeError where it was built without CUDA kernels."""
    from twilight_engine import _C

    if not _C.has_cuda:
        raise RuntimeError(
            "twilight_engine._C was built without CUDA kernels (nvcc was not found at build time); "
            "install CUDA's nvcc and build again, or use device='cpu'"
        )
    return _C


def ptr(tensor: Tensor | None) -> int:
    """The address a kernel gets; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def current_stream(tensor: Tensor) -> int:
    """torch's current stream on the tensor's device, as an integer."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def aligned_rows(x: Tensor) -> Tensor:
    """x, or a copy, whose last dimension is contiguous and starts at multiples of 16 bytes."""
    starts = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])]
    if x.stride(-1) == 1 and all(start % VECTOR_BYTES == 0 for start in starts):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def row_dtype(name: str, tensor: Tensor) -> int:
    """The kernel's code of a row dtype; NotImplementedError for others."""
    if tensor.dtype not in ROW_DTYPES:
        raise NotImplementedError(
            f"{name} has dtype {tensor.dtype}; supported: {', '.join(map(str, ROW_DTYPES))}"
        )
    return ROW_DTYPES[tensor.dtype]


def check_head_dim(head_dim: int) -> None:
    """NotImplementedError for a head_dim no kernel is built for."""
    if head_dim not in SUPPORTED_HEAD_DIMS:
        raise NotImplementedError(
            f"head_dim is {head_dim}; supported: {', '.join(map(str, SUPPORTED_HEAD_DIMS))}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """ValueError unless the tensor has this shape; None matches any size."""
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(
        want is not None and have != want for have, want in zip(got, shape, strict=True)
    ):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} has shape {list(got)}; it must be [{wanted}]")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """ValueError unless the tensor has one of these dtypes."""
    if tensor.dtype not in allowed:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; it must be {' or '.join(map(str, allowed))}"
        )

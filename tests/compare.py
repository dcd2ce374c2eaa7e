"""One comparison for all kernels, and one table of tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

# Multiples of the dtype's step (torch.finfo.eps) allowed per element, absolute (on values of
# order one) or relative, and the largest 1 - cosine over the whole tensor.
TOLERANCE = {
    torch.float32: (256.0, 1e-9),
    torch.float16: (8.0, 5e-6),
    torch.bfloat16: (4.0, 5e-5),
}


def compare(
    actual: Tensor, expected: Tensor, *, step_dtype: torch.dtype | None = None, factor: float = 1.0
) -> None:
    """Assert equal inf/nan masks, then abs-or-rel closeness per element, then a cosine bound.

    Args:
        step_dtype: the coarsest dtype on the way (default: actual's); its step sets the tolerance.
        factor: multiplies the tolerance, for ops that accumulate more than one rounding.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    steps, cosine_bound = TOLERANCE[step_dtype or actual.dtype]
    tolerance = steps * factor * torch.finfo(step_dtype or actual.dtype).eps
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    for name, mask in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        assert torch.equal(mask(a), mask(e)), f"{name} masks differ"
    finite = torch.isfinite(e)
    a, e = a[finite], e[finite]
    if a.numel() == 0:
        return
    error = (a - e).abs()
    worst = (error - tolerance * e.abs().clamp(min=1.0)).argmax()
    assert (error <= tolerance * e.abs().clamp(min=1.0)).all(), (
        f"element {worst.item()}: {a[worst].item()} against {e[worst].item()}, "
        f"error {error[worst].item():.3e}, allowed {tolerance:.3e} absolute or relative; "
        f"{(error > tolerance * e.abs().clamp(min=1.0)).sum().item()} of {a.numel()} are off"
    )
    norm = a.norm() * e.norm()
    if norm > 0:
        assert 1 - (a @ e) / norm <= cosine_bound * factor, f"cosine {(a @ e / norm).item()}"

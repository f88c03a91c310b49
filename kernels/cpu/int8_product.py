"""Products of 8-bit matrices on a CPU, exact."""

import torch
from torch import Tensor

from ..fast_paths import fast_path

# Private, and not in every build of PyTorch.
_INT_MM = getattr(torch, "_int_mm", None)
_HAS_VNNI = getattr(torch.cpu, "_is_vnni_supported", None)


def int8_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a · b of int8 matrices into int32 `out`. Their sums must stay below 2^24.

    PyTorch's own 8-bit product where it is fast, which is four times as fast as fp32; else fp32, which gives the same.
    """
    if a.device.type == "cpu" and _is_fast():
        assert _INT_MM is not None
        return _INT_MM(a, b, out=out)
    return out.copy_(torch.mm(a.float(), b.float()))


def _is_fast() -> bool:
    """Whether PyTorch's own product is used. Without VNNI instructions it is right and slow, which no try can tell."""
    if _INT_MM is None or _HAS_VNNI is None or not (torch.backends.mkldnn.is_available() and _HAS_VNNI()):
        return False
    return _int8_products()


@fast_path("8-bit products")
def _int8_products() -> bool:
    """On numbers at which some CPUs saturate sums of pairs."""
    assert _INT_MM is not None
    a = torch.arange(-128, 128).repeat(64).to(torch.int8).view(64, 256)
    b = a.flip(1).T
    out = torch.empty(64, 64, dtype=torch.int32)
    return torch.equal(_INT_MM(a, b, out=out).float(), a.float() @ b.float())

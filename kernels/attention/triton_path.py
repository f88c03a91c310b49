"""Whether a GPU's packed pages are packed and attended to by the Triton kernels, or by their PyTorch references."""

from functools import partial

import torch

from ..fast_paths import FastPath, alike, spread
from ..pages.layout import PageLayout
from ..pages.pack import Rotations, pack_reference
from ..pages.unpack import unpack_reference
from ..rotation import hadamard
from .paged import PagedKV, paged_attention_reference

_PAGE, _DIM = 16, 64


def has_triton(device: torch.device) -> bool:
    """Whether the kernels are used on that device; the first call compiles and tries them."""
    return FastPath(f"Triton kernels on {device}", partial(triton_works, device))()


def triton_works(device: torch.device) -> bool:
    """Two pages are packed, then read beside a raw one by 4 query heads of 2 KV heads."""
    from ..pages.pack_triton import pack
    from .paged_triton import paged_attention

    layout = PageLayout(head_dim=_DIM, page_tokens=_PAGE, key_bits=4, value_bits=4)
    one, inverse = torch.ones(2, _DIM, device=device), hadamard(_DIM).T.float().to(device) / _DIM**0.5
    rotations = Rotations(
        inverse.expand(2, -1, -1).contiguous(), inverse.contiguous(), one / _DIM**0.5, one[0] / _DIM**0.5, one, one[0]
    )
    k_THD, v_THD = (x.to(device) for x in spread(2, 3 * _PAGE, 2, _DIM))
    packed_SB = torch.zeros(2, 2 * layout.head_bytes, dtype=torch.uint8, device=device)
    places = torch.arange(3, device=device)
    pack(k_THD, v_THD, places[:2] * _PAGE, one, one[0], layout, packed_SB, places[:2])
    wanted_PB = pack_reference(k_THD[: 2 * _PAGE], v_THD[: 2 * _PAGE], rotations, layout)
    decoded = (unpack_reference(pages_PB, rotations, layout, torch.float32) for pages_PB in (packed_SB, wanted_PB))
    near = [(fast - plain).norm() <= 0.03 * plain.norm() for fast, plain in zip(*decoded, strict=True)]
    kv = PagedKV(
        raw_k_RPHD=k_THD[2 * _PAGE :][None],
        raw_v_RPHD=v_THD[2 * _PAGE :][None],
        packed_SB=packed_SB,
        table_BN=torch.tensor([[0, 1, 0]], dtype=torch.int32, device=device),
        packed_from_B=torch.tensor([0], dtype=torch.int32, device=device),
        packed_to_B=torch.tensor([2], dtype=torch.int32, device=device),
        lengths_B=torch.tensor([3 * _PAGE - 3], dtype=torch.int32, device=device),
        layout=layout,
    )
    q_BQHD = spread(1, 1, 4, _DIM).to(device)
    fast, plain = (f(q_BQHD, kv, rotations, 0.3)[0] for f in (paged_attention, paged_attention_reference))
    return all(map(bool, near)) and alike(fast, plain, 3e-2)

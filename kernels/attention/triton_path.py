"""Whether a GPU's pages are packed, unpacked and attended to by the Triton kernels, or by their PyTorch references."""

from functools import partial

import torch

from ..fast_paths import FastPath, alike, spread
from ..pages.layout import PageLayout
from ..pages.reference import pack_reference, unpack_reference
from ..pages.rotation import build_rotations
from .paged import PagedKV, paged_attention_reference

_PAGE, _DIM = 16, 64


def has_triton(device: torch.device) -> bool:
    """Whether the kernels are used on that device; the first call compiles and tries them."""
    return device.type == "cuda" and FastPath(f"Triton kernels on {device}", partial(triton_works, device))()


def triton_works(device: torch.device) -> bool:
    """Two pages are packed, unpacked, and read beside a raw one by 4 query heads of 2 KV heads."""
    from ..pages.pack_triton import pack
    from ..pages.unpack_triton import unpack
    from .paged_triton import paged_attention

    layout = PageLayout(head_dim=_DIM, page_tokens=_PAGE, key_bits=4, value_bits=4)
    rotations = build_rotations(torch.ones(2, _DIM), device)
    k_THD, v_THD = (x.to(device) for x in spread(2, 3 * _PAGE, 2, _DIM))
    packed_SB = torch.zeros(2, 2 * layout.head_bytes, dtype=torch.uint8, device=device)
    slots = torch.arange(2, device=device)
    pack(k_THD, v_THD, slots * _PAGE, rotations, layout, packed_SB, slots)
    wanted_SB = pack_reference(k_THD[: 2 * _PAGE], v_THD[: 2 * _PAGE], rotations, layout)
    dense, same, wanted = (
        unpack(packed_SB, rotations, layout, torch.float32),
        *(unpack_reference(pages_SB, rotations, layout, torch.float32) for pages_SB in (packed_SB, wanted_SB)),
    )
    near = [(fast - plain).norm() <= 0.03 * plain.norm() for fast, plain in zip(same, wanted, strict=True)]
    near += [alike(fast, plain) for fast, plain in zip(dense, same, strict=True)]
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

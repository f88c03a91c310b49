"""Packing and unpacking of pages in PyTorch: plain, in float64, on any device (layout: `layout.py`).

    pack      y = W (x - mean)           W = H diag(signs / balance) / sqrt(d); values have no mean and no balance
              code = nearest centroid of y unit / rms(y)
              scale = |y| / |centroids|  so the norm is preserved
    unpack    x = W⁻¹ (scale centroids + mean)

The fast paths, `pack_cpu.py`, `unpack_cpu.py` and the Triton kernels, are compared with these functions, and leave to
them what they cannot do.

Shape suffixes: N pages, P tokens of a page, T = N P tokens, H KV heads, D head dimension, B bytes of a packed page, of
one head where H is named too, C columns of a row.

Source: TurboQuant's MSE form (arXiv 2504.19874) with page means of the keys, a diagonal balance and
norm-preserving scales.
"""

import torch
from torch import Tensor

from .codebook import centroids, unit
from .layout import PageLayout, from_scale16, to_scale16
from .rotation import Rotations, hadamard

_BF16_MAX = 3.3895313892515355e38
_NO_NORM = 1e-300  # shorter vectors count as zero


class NotFinite(ArithmeticError):
    """A page holds NaN or infinity."""


def pack_reference(k_THD: Tensor, v_THD: Tensor, rotations: Rotations, layout: PageLayout) -> Tensor:
    """uint8 [N, B] of keys and values of any float dtype. NotFinite where one is NaN or infinite."""
    y_key_NHPD = _rotated(k_THD, rotations.key_weight_HD[:, None], layout)
    y_value_NHPD = _rotated(v_THD, rotations.value_weight_D, layout)
    mean_NHD = y_key_NHPD.mean(2).clamp(-_BF16_MAX, _BF16_MAX).to(torch.bfloat16)
    # The mean is subtracted as it is stored, so that its rounding costs nothing.
    code_key_NHPD, scale_key_NHP = _quantized(y_key_NHPD - mean_NHD.double()[:, :, None], layout.key_bits)
    code_value_NHPD, scale_value_NHP = _quantized(y_value_NHPD, layout.value_bits)
    sections = {
        0: join_codes(code_key_NHPD, layout.key_bits),
        layout.codes_value: join_codes(code_value_NHPD.transpose(2, 3), layout.value_bits),
        layout.scale_key: to_scale16(scale_key_NHP).view(torch.uint8),
        layout.scale_value: to_scale16(scale_value_NHP).view(torch.uint8),
        layout.mean_key: mean_NHD.view(torch.uint8),
    }
    packed_NHB = torch.zeros(*mean_NHD.shape[:2], layout.head_bytes, dtype=torch.uint8, device=k_THD.device)
    for start, section_NHB in sections.items():
        packed_NHB[:, :, start : start + section_NHB.shape[2]] = section_NHB
    return packed_NHB.flatten(1)


def unpack_reference(
    packed_NB: Tensor, rotations: Rotations, layout: PageLayout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [T, H, D] of packed pages uint8 [N, B].

    Values outside of the range of `dtype` become its largest or smallest finite value.
    """
    page, dim, heads = layout.page_tokens, layout.head_dim, len(rotations.key_gain_HD)
    packed_NHB = packed_NB.view(len(packed_NB), heads, layout.head_bytes)

    def section(start: int, size: int) -> Tensor:
        return packed_NHB[:, :, start : start + size].contiguous()

    code_key_NHPD = split_codes(section(0, layout.code_bytes_key), page, layout.key_bits)
    code_value_NHDP = split_codes(section(layout.codes_value, layout.code_bytes_value), dim, layout.value_bits)
    scale_key_NHP = from_scale16(section(layout.scale_key, 2 * page).view(torch.int16)).double()
    scale_value_NHP = from_scale16(section(layout.scale_value, 2 * page).view(torch.int16)).double()
    mean_NHD = section(layout.mean_key, 2 * dim).view(torch.bfloat16).double()
    y_key_NHPD = _points(code_key_NHPD, layout.key_bits) * scale_key_NHP[..., None] + mean_NHD[:, :, None]
    y_value_NHPD = _points(code_value_NHDP, layout.value_bits).transpose(2, 3) * scale_value_NHP[..., None]
    limit, matrix_DD = torch.finfo(dtype).max, hadamard(dim).to(packed_NB.device).double()
    k_NHPD = y_key_NHPD @ matrix_DD * rotations.key_gain_HD[:, None]
    v_NHPD = y_value_NHPD @ matrix_DD * rotations.value_gain_D
    k_NPHD, v_NPHD = (x.clamp(-limit, limit).to(dtype).transpose(1, 2).contiguous() for x in (k_NHPD, v_NHPD))
    return k_NPHD.flatten(0, 1), v_NPHD.flatten(0, 1)


def join_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, H, rows, C] -> the bytes of their section, uint8 [N, H, rows * C * bits / 8]."""
    if bits == 4:
        low, high = codes.chunk(2, -1)
        return (low | high << 4).flatten(2)
    a, b, c, d = (codes & 3).chunk(4, -1)
    plane = (a | b << 2 | c << 4 | d << 6).flatten(2)
    if bits == 2:
        return plane
    a, b, c, d = (codes >> 2).chunk(4, -1)
    low, high = (a | b << 1 | c << 2 | d << 3).chunk(2, -1)
    return torch.cat([plane, (low | high << 4).flatten(2)], 2)


def split_codes(section_NHB: Tensor, rows: int, bits: int) -> Tensor:
    """The inverse of `join_codes`: uint8 [N, H, rows, C]."""
    if bits == 4:
        byte = section_NHB.unflatten(2, (rows, -1))
        return torch.cat([byte & 15, byte >> 4], -1)
    size = section_NHB.shape[2] * 2 // bits
    byte = section_NHB[:, :, :size].unflatten(2, (rows, -1))
    codes = torch.cat([byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6], -1)
    if bits == 2:
        return codes
    byte = section_NHB[:, :, size:].unflatten(2, (rows, -1))
    nibble = torch.cat([byte & 15, byte >> 4], -1)
    return codes | torch.cat([nibble >> group & 1 for group in range(4)], -1) << 2


def _rotated(x_THD: Tensor, weight: Tensor, layout: PageLayout) -> Tensor:
    """float64 [N, H, P, D]: y = H (weight x) / sqrt(d)."""
    if not bool(x_THD.isfinite().all()):
        raise NotFinite("a page holds NaN or infinity")
    x_NHPD = x_THD.double().unflatten(0, (-1, layout.page_tokens)).transpose(1, 2)
    matrix_DD = hadamard(layout.head_dim).to(x_THD.device).double()
    return (x_NHPD * weight) @ matrix_DD.T / layout.head_dim**0.5


def _quantized(y_NHPD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and scales [N, H, P], float32."""
    norm_NHP = y_NHPD.norm(dim=-1)
    rms_NHP = norm_NHP.clamp_min(_NO_NORM) / y_NHPD.shape[-1] ** 0.5
    points = torch.tensor(centroids(bits), device=y_NHPD.device).double()
    midpoints = (points[1:] + points[:-1]) / 2
    codes = torch.bucketize(y_NHPD * (unit(bits) / rms_NHP[..., None]), midpoints, right=True)
    scale_NHP = (norm_NHP / points[codes].norm(dim=-1)).clamp_max(_BF16_MAX)
    return codes.to(torch.uint8), scale_NHP.float()


def _points(codes: Tensor, bits: int) -> Tensor:
    """float64 centroids of codes."""
    return torch.tensor(centroids(bits), device=codes.device).double()[codes.long()]

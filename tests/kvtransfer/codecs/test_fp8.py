"""A decoder of `fp8` in plain Python, written from docs/codec.md alone."""

import math
import struct

import torch

from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.registry import build_codec

P, D = 8, 32


def e4m3(byte: int) -> float:
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
    return -size if byte & 128 else size


def test_fp8():
    torch.manual_seed(0)
    codec = build_codec("fp8", [LayerShape(kv_heads=2, head_dim=D)], P)
    packed = codec.encode(0, torch.randn(P, 2, D), torch.randn(P, 2, D))
    decoded = codec.decode(0, packed, torch.float32)
    data = packed[0].numpy().tobytes()
    for head in range(2):
        section = data[head * len(data) // 2 : (head + 1) * len(data) // 2]
        kinds = [section[kind * P * D : (kind + 1) * P * D] for kind in range(2)]
        scales = struct.unpack_from("<ff", section, 2 * P * D)
        assert section[2 * P * D + 8 :] == bytes(8)
        for kind, numbers, scale in zip(decoded, kinds, scales, strict=True):
            wanted = torch.tensor([scale * e4m3(byte) for byte in numbers]).view(P, D)
            assert torch.allclose(kind[:, head], wanted, rtol=1e-5, atol=0)

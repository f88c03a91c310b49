"""Decoders of `fp8` and the published quantizers, in plain Python, written from docs/codec.md alone."""

import math
import struct

import pytest
import torch

from isthmus.kernels.rotation import hadamard, signs
from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.registry import build_codec

P, D = 8, 32
POINTS = {
    1: [0.7978846],
    2: [0.45278, 1.5104176],
    3: [0.2450942, 0.7560052, 1.3439093, 2.1519457],
    4: [0.128395, 0.3880483, 0.6567591, 0.9423404, 1.2562312, 1.6180464, 2.0690173, 2.7326357],
}
ANGLES = {
    (2, 2): [0.3097056, 0.6339447, 0.9368517, 1.2610907],
    (3, 2): [0.4262013, 0.6743569, 0.8964394, 1.1445951],
    (4, 2): [0.5242016, 0.7059028, 0.8648935, 1.0465947],
    (2, 1): [0.5, 1.0707963],
    (3, 1): [0.5833333, 0.987463],
    (4, 1): [0.6431548, 0.9276416],
}


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def codes(self, count: int, bits: int) -> list[int]:
        stream = int.from_bytes(self.take(count * bits // 8), "little")
        return [stream >> i * bits & (1 << bits) - 1 for i in range(count)]

    def norms(self, count: int) -> list[float]:
        return [struct.unpack("<e", self.take(2))[0] for _ in range(count)]


def unrotate(y: list[float]) -> list[float]:
    dim = len(y)
    matrix, sign = hadamard(dim).tolist(), signs(2, dim).tolist()
    return [sign[c] * sum(matrix[i][c] * y[i] for i in range(dim)) / math.sqrt(dim) for c in range(dim)]


def mse(section: Reader, dim: int, bits: int) -> list[list[float]]:
    points = [-p for p in reversed(POINTS[bits])] + POINTS[bits]
    codes, norms = section.codes(P * dim, bits), section.norms(P)
    return [unrotate([norms[t] * points[c] for c in codes[t * dim : (t + 1) * dim]]) for t in range(P)]


def normal_matrix() -> list[list[float]]:
    state, out, mask = 3, [], (1 << 64) - 1

    def uniform() -> float:
        nonlocal state
        state = state + 0x9E3779B97F4A7C15 & mask
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return (((z ^ z >> 31) >> 11) + 0.5) / 2**53

    while len(out) < D * D:
        radius, angle = math.sqrt(-2 * math.log(uniform())), 2 * math.pi * uniform()
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return [out[i * D : (i + 1) * D] for i in range(D)]


def prod(section: Reader, bits: int) -> list[list[float]]:
    first = mse(section, D, bits - 1)
    positive, norms, s = section.codes(P * D, 1), section.norms(P), normal_matrix()
    factor = math.sqrt(math.pi / 2 / D)
    for t in range(P):
        sign = [2 * b - 1 for b in positive[t * D : (t + 1) * D]]
        for c in range(D):
            first[t][c] += factor * norms[t] * sum(s[i][c] * sign[i] for i in range(D))
    return first


def outliers(section: Reader, bits: int) -> list[list[float]]:
    strong = section.codes(D, 1)
    parts = {1: mse(section, D // 2, bits + 1), 0: mse(section, D // 2, bits)}
    rows = []
    for t in range(P):
        left = {kind: iter(parts[kind][t]) for kind in parts}
        rows.append([next(left[kind]) for kind in strong])
    return rows


def polar(section: Reader, widths: tuple[int, ...]) -> list[list[float]]:
    blocks = P * D // 16
    codes = [section.codes(blocks * (16 >> level), bits) for level, bits in enumerate(widths, 1)]
    radii = [4 * norm for norm in section.norms(blocks)]
    for level in (4, 3, 2):
        angles = [ANGLES[level, widths[level - 1]][code] for code in codes[level - 1]]
        radii = [x for r, a in zip(radii, angles, strict=True) for x in (r * math.cos(a), r * math.sin(a))]
    angles = [(code + 0.5) * 2 * math.pi / (1 << widths[0]) for code in codes[0]]
    y = [x for r, a in zip(radii, angles, strict=True) for x in (r * math.cos(a), r * math.sin(a))]
    return [unrotate(y[t * D : (t + 1) * D]) for t in range(P)]


DECODERS = {
    **{f"turboquant-mse-{b}": lambda section, b=b: mse(section, D, b) for b in (2, 3, 4)},
    **{f"turboquant-prod-{b}": lambda section, b=b: prod(section, b) for b in (2, 3, 4)},
    "turboquant-3.5": lambda section: outliers(section, 3),
    "turboquant-2.5": lambda section: outliers(section, 2),
    "polarquant-4": lambda section: polar(section, (4, 2, 2, 2)),
    "polarquant-3": lambda section: polar(section, (3, 1, 1, 1)),
}


def page() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(P, 2, D), torch.randn(P, 2, D)]


@pytest.mark.parametrize("name", DECODERS)
def test_published_quantizers(name: str):
    codec = build_codec(name, [LayerShape(kv_heads=2, head_dim=D)], P)
    packed = codec.encode(0, *page())
    decoded = codec.decode(0, packed, torch.float32)
    data = packed[0].numpy().tobytes()
    for head in range(2):
        for kind in range(2):
            start = (2 * head + kind) * len(data) // 4
            section = Reader(data[start : start + len(data) // 4])
            rows = DECODERS[name](section)
            assert not any(section.data[section.at :]) and len(section.data) - section.at < 16
            assert torch.allclose(decoded[kind][:, head], torch.tensor(rows), atol=1e-4)


def e4m3(byte: int) -> float:
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
    return -size if byte & 128 else size


def test_fp8():
    codec = build_codec("fp8", [LayerShape(kv_heads=2, head_dim=D)], P)
    packed = codec.encode(0, *page())
    decoded = codec.decode(0, packed, torch.float32)
    data = packed[0].numpy().tobytes()
    for head in range(2):
        section = Reader(data[head * len(data) // 2 : (head + 1) * len(data) // 2])
        kinds = [section.take(P * D) for _ in range(2)]
        scales = [struct.unpack("<f", section.take(4))[0] for _ in range(2)]
        assert section.data[section.at :] == bytes(8)
        for kind, numbers, scale in zip(decoded, kinds, scales, strict=True):
            wanted = torch.tensor([scale * e4m3(byte) for byte in numbers]).view(P, D)
            assert torch.allclose(kind[:, head], wanted, rtol=1e-5, atol=0)

"""The published quantizers that benchmarks compare ours with: golden bytes, and decoders in plain Python, written from
the README.md beside them alone."""

import math
import re
import struct
from pathlib import Path

import pytest
import torch
from codec_checks import (
    HEAD_DIMS,
    SIZES,
    check_error,
    check_mixed_sizes,
    check_neighbours,
    check_refused,
    check_size,
    digest,
    example,
    layer,
)
from quantizers.codec import PUBLISHED, PublishedCodec

from isthmus.kernels.pages.rotation import hadamard, signs
from isthmus.kernels.shapes import LayerShape

DOCUMENT = Path(__file__).parents[2] / "benchmarks" / "quantizers" / "README.md"
# sha256 of a page of 8 tokens, 1 head, 16 dimensions.
GOLDEN = {
    "turboquant-mse-4": "05066949c1d52e43",
    "turboquant-mse-3": "a45013abae64a97c",
    "turboquant-mse-2": "343e46df18f444d1",
    "turboquant-prod-4": "d63c15dff833f6fb",
    "turboquant-prod-3": "fac6b2ee6e876770",
    "turboquant-prod-2": "a3b8e600904ef815",
    "turboquant-3.5": "9d8adb9b0fe143ea",
    "turboquant-2.5": "9039de822c16b836",
    "polarquant-4": "d748cb3f770ee595",
    "polarquant-3": "903b8a95484e73f0",
}

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
def test_decoders_written_from_the_document(name: str):
    codec = PublishedCodec(name, [LayerShape(kv_heads=2, head_dim=D)], P)
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_golden_bytes(name: str):
    packed = PublishedCodec(name, layer(1, 16), 8).encode(0, example(8, 1, 16), example(8, 1, 16))
    assert digest(packed) == GOLDEN[name]


def test_the_document_shows_golden_bytes():
    x_THD = example(8, 1, 16)
    packed = PublishedCodec("turboquant-mse-2", layer(1, 16), 8).encode(0, x_THD, x_THD)
    shown = re.findall(r"\b[0-9a-f]{16,}\b", DOCUMENT.read_text())
    assert "".join(shown) == packed[0, :48].numpy().tobytes().hex()


@pytest.mark.parametrize("dim", (16, *HEAD_DIMS))
@pytest.mark.parametrize("name", PUBLISHED)
def test_error_is_what_the_bits_allow(name: str, dim: int):
    check_error(PublishedCodec, name, dim)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_finite_page_packs(name: str, size: float):
    check_size(PublishedCodec, name, size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_lonely_channels_and_mixed_sizes(name: str):
    check_mixed_sizes(PublishedCodec, name)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_no_number_is_refused(name: str, bad: float):
    check_refused(PublishedCodec, name, bad)


@pytest.mark.parametrize("name", PUBLISHED)
def test_pages_do_not_depend_on_their_neighbours(name: str):
    check_neighbours(PublishedCodec, name)

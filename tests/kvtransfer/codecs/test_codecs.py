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
    error,
    example,
    layer,
)

from isthmus.kernels.pages.codebook import centroids
from isthmus.kernels.pages.reference import pack_reference
from isthmus.kernels.pages.rotation import hadamard, signs
from isthmus.kvtransfer.codecs.registry import TQ_BITS, build_codec, codec_names
from isthmus.proto.errors import Corrupt, InvalidRequest, NotFound

PACKING = [name for name in codec_names() if name != "raw"]
DOCUMENT = Path(__file__).parents[3] / "docs" / "codec.md"

# The page of the worked example in docs/codec.md: 8 tokens, 1 head, 8 dimensions.
GOLDEN = {
    "tq-k4v4": "e8ad85b55cd435bb56846e275234a5b4a9b9916d59a49e2528198a66e78d75b7baa498838c3c83c489959ba773cb7c33"
    "4bc62aa4fc3c13c4988c766a8c3483cc4139883938390b3a65393539053a4b391f3a013a0a39283a85391d392b3a173a"
    "9e40793f9ebf6840a44068c09e40ad40",
    "tq-k3v2": "385a6a66ef4e695a51d82c5a04ccfb4edde142887d4b1bd40000000000000000aaa1a3c3aaa55c330bb533c3666ba3cc"
    "a7373538d937aa38be37b2379737d637fd35f3356b350c364e383635343857369e40793f9ebf6840a44068c09e40ad40",
    "tq-k2v2": "b6a717b95d259485a26e9e258a4675a7aaa1a3c3aaa55c330bb533c3666ba3cc00384d37b63759380c3806383f38b437"
    "fd35f3356b350c364e383635343857369e40793f9ebf6840a44068c09e40ad40",
}
# sha256 of the page above for the other codecs that pack 8 dimensions.
GOLDEN_OTHERS = {
    "fp8": "85a8b20e84727151",
    "tq-k4v3": "13b14448659b6cca",
    "tq-k4v2": "46a6c9bd8e3ad7dd",
    "tq-k3v3": "d315e4742dcd118c",
}
# sha256 of a page of `tq-k4v3`, 64 tokens, 2 heads.
GOLDEN_DIMS = {
    64: (7936, "a0f7ae3fecedacd5"),
    80: (9792, "b7e213ef7218a270"),
    96: (11648, "8eb8dc6cc441f956"),
    128: (15360, "ba759a97fa363609"),
    192: (22784, "f8361fd486b4df25"),
    256: (30208, "7c7863eee5367cba"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str):
    x_THD = example(8, 1, 8)
    packed = build_codec(name, layer(1, 8), 8).encode(0, x_THD, x_THD)
    assert packed[0].numpy().tobytes().hex() == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN_OTHERS)
def test_golden_others(name: str):
    packed = build_codec(name, layer(1, 8), 8).encode(0, example(8, 1, 8), example(8, 1, 8))
    assert digest(packed) == GOLDEN_OTHERS[name]


def test_every_codec_that_packs_has_golden_bytes():
    assert {*GOLDEN, *GOLDEN_OTHERS} == set(PACKING)


def test_document_shows_the_golden_bytes():
    shown = re.findall(r"\b[0-9a-f]{16,}\b", DOCUMENT.read_text())
    assert "".join(shown) == GOLDEN["tq-k3v2"]


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_golden_head_dims(dim: int):
    codec = build_codec("tq-k4v3", layer(2, dim), 64)
    x_THD = example(64, 2, dim)
    assert (codec.page_bytes(0), digest(codec.encode(0, x_THD, x_THD))) == GOLDEN_DIMS[dim]
    reference = pack_reference(x_THD, x_THD, codec.rotations(0, x_THD.device), codec.layout(0))
    assert digest(reference) == GOLDEN_DIMS[dim][1]


def number(section: bytes, token: int) -> float:
    bits = struct.unpack_from("<H", section, 2 * token)[0]
    if bits & 0x8000:
        return struct.unpack("<f", struct.pack("<I", (bits & 0x7FFF) << 16))[0]
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def code(section: bytes, rows: int, columns: int, bits: int, row: int, column: int) -> int:
    """One code by the layout in docs/codec.md, a bit at a time."""
    if bits == 4:
        half = columns // 2
        return section[row * half + column % half] >> 4 * (column // half) & 15
    quarter = columns // 4
    low = section[row * quarter + column % quarter] >> 2 * (column // quarter) & 3
    if bits == 2:
        return low
    eighth, place = quarter // 2, column % quarter
    nibble = section[rows * quarter + row * eighth + place % eighth] >> 4 * (place // eighth) & 15
    return low | (nibble >> column // quarter & 1) << 2


@pytest.mark.parametrize("name", TQ_BITS)
def test_decoder_written_from_the_document(name: str):
    """Plain Python over the bytes gives what the codec decodes."""
    page, dim = 16, 48
    key_bits, value_bits = TQ_BITS[name]
    torch.manual_seed(0)
    k_THD, v_THD = torch.randn(page, 1, dim) + 3, torch.randn(page, 1, dim)
    codec = build_codec(name, layer(1, dim), page)
    packed = codec.encode(0, k_THD, v_THD)
    k_got, v_got = codec.decode(0, packed, torch.float32)
    data = packed[0].numpy().tobytes()
    at, sections = 0, []
    for size in (page * dim * key_bits // 8, page * dim * value_bits // 8, 2 * page, 2 * page, 2 * dim):
        sections.append(data[at : at + size])
        at += -(-size // 16) * 16
    assert at == len(data)
    codes_k, codes_v, scale_k, scale_v, mean_k = sections
    mean = [struct.unpack("<f", b"\0\0" + mean_k[2 * c : 2 * c + 2])[0] for c in range(dim)]
    matrix, key_signs, value_signs = hadamard(dim).double() / dim**0.5, signs(1, dim), signs(2, dim)
    for t in range(page):
        points = [centroids(key_bits)[code(codes_k, page, dim, key_bits, t, c)] for c in range(dim)]
        y = torch.tensor([number(scale_k, t) * p + m for p, m in zip(points, mean, strict=True)]).double()
        assert torch.allclose(k_got[t, 0].double(), key_signs * (matrix.T @ y), atol=1e-5)
        points = [centroids(value_bits)[code(codes_v, dim, page, value_bits, c, t)] for c in range(dim)]
        y = torch.tensor([number(scale_v, t) * p for p in points]).double()
        assert torch.allclose(v_got[t, 0].double(), value_signs * (matrix.T @ y), atol=1e-5)


@pytest.mark.parametrize("dim", (16, *HEAD_DIMS))
@pytest.mark.parametrize("name", PACKING)
def test_error_is_what_the_bits_allow(name: str, dim: int):
    check_error(build_codec, name, dim)


def test_page_means_cost_nothing_to_remove():
    """A large common part of a page's keys does not disturb what differs between them."""
    torch.manual_seed(0)
    k_THD = torch.randn(64, 1, 64)
    codec = build_codec("tq-k4v4", layer(1, 64), 64)
    shifted, _ = codec.decode(0, codec.encode(0, k_THD + 50, k_THD), torch.float32)
    assert error(shifted - 50, k_THD) < 0.1


def test_norms_of_values_are_kept():
    torch.manual_seed(0)
    v_THD = torch.randn(64, 2, 64) * torch.logspace(-2, 3, 64)[:, None, None]
    codec = build_codec("tq-k2v2", layer(2, 64), 64)
    _, got = codec.decode(0, codec.encode(0, v_THD, v_THD), torch.float32)
    assert torch.allclose(got.norm(dim=-1), v_THD.norm(dim=-1), rtol=1e-3)


def test_balance_moves_precision_to_where_it_is_wanted():
    torch.manual_seed(0)
    k_THD = torch.randn(64, 1, 64)
    balance = torch.ones(1, 64)
    balance[0, :8] = 0.25
    balance /= balance.log().mean().exp()
    got, _ = (codec := build_codec("tq-k3v3", layer(1, 64), 64, [balance])).decode(
        0, codec.encode(0, k_THD, k_THD), torch.float32
    )
    plain, _ = (codec := build_codec("tq-k3v3", layer(1, 64), 64)).decode(
        0, codec.encode(0, k_THD, k_THD), torch.float32
    )
    assert error(got[..., :8], k_THD[..., :8]) < 0.6 * error(plain[..., :8], k_THD[..., :8])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PACKING)
def test_every_finite_page_packs(name: str, size: float):
    check_size(build_codec, name, size)


@pytest.mark.parametrize("name", PACKING)
def test_lonely_channels_and_mixed_sizes(name: str):
    check_mixed_sizes(build_codec, name)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", PACKING)
def test_what_is_no_number_is_refused(name: str, bad: float):
    check_refused(build_codec, name, bad)


@pytest.mark.parametrize("name", PACKING)
def test_pages_do_not_depend_on_their_neighbours(name: str):
    check_neighbours(build_codec, name)


def test_hash_covers_what_decides_the_bytes():
    shapes = layer(2, 64)
    balance = [torch.full((2, 64), 1.5)]
    hashes = [
        build_codec(*args).params_hash
        for args in (
            ("tq-k4v4", shapes, 64),
            ("tq-k4v3", shapes, 64),
            ("tq-k4v4", shapes, 32),
            ("tq-k4v4", shapes * 2, 64),
            ("tq-k4v4", shapes, 64, balance),
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == build_codec("tq-k4v4", shapes, 64, [torch.ones(2, 64)]).params_hash


def test_refusals():
    with pytest.raises(NotFound, match=r"no codec 'zip'; there are raw, fp8, tq-k4v4"):
        build_codec("zip", layer(1, 64), 64)
    with pytest.raises(InvalidRequest, match="head dimension 72"):
        build_codec("tq-k4v4", layer(1, 72), 64)
    with pytest.raises(InvalidRequest, match="page size 20"):
        build_codec("tq-k4v4", layer(1, 64), 20)
    codec = build_codec("tq-k4v4", layer(1, 64), 64)
    with pytest.raises(Corrupt, match="wanted uint8"):
        codec.decode(0, torch.zeros(1, 100, dtype=torch.uint8), torch.float32)
    with pytest.raises(Corrupt, match="balance"):
        build_codec("tq-k4v4", layer(1, 64), 64, [torch.zeros(1, 64)])


def test_raw_is_available_for_any_shape():
    assert not build_codec("raw", layer(1, 72), 20).packs


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter computes lanes that are masked off
@pytest.mark.parametrize("name", TQ_BITS)
def test_a_gpu_packs_and_unpacks_in_triton(name: str, monkeypatch: pytest.MonkeyPatch):
    """Under Triton's interpreter: what it packs and the CPU packs mean the same."""
    torch.manual_seed(0)
    k_THD, v_THD = torch.randn(2, 16, 32, 48).transpose(1, 2)  # [32, 16, 48]: a token's heads are not contiguous
    codec = build_codec(name, layer(16, 48), 16)
    wanted = codec.encode(0, k_THD, v_THD)
    dense = codec.decode(0, wanted, torch.float32)
    monkeypatch.setattr("isthmus.kvtransfer.codecs.tq.has_triton", lambda device: True)
    packed = codec.encode(0, k_THD, v_THD)
    assert float((packed != wanted).float().mean()) < 0.01
    for got, same in zip(codec.decode(0, wanted, torch.float32), dense, strict=True):
        assert error(got, same) < 1e-6
    k_THD[20, 3, 1] = math.nan
    with pytest.raises(InvalidRequest, match="KV head 3: the keys of token 20"):
        codec.encode(0, k_THD, v_THD)

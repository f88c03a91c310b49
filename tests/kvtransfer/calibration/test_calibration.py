import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.calibration.balance import (
    Attend,
    Moments,
    balance_path,
    calibrate,
    ensure_balance,
    load_balance,
    save_balance,
)
from isthmus.kvtransfer.calibration.progress import calibrated_share
from isthmus.kvtransfer.calibration.text import TEXT
from isthmus.proto.errors import Corrupt, InvalidRequest

LAYERS = (LayerShape(kv_heads=2, head_dim=16), LayerShape(kv_heads=1, head_dim=32, window=9))


def moments_of(key_size: Tensor, query_size: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    moments = Moments(LAYERS, 8)
    moments.add(0, torch.randn(4000, 6, 16) * query_size, torch.randn(4000, 2, 16) * key_size + 100)
    return moments.balance()


def test_balance_is_the_fourth_root_of_the_ratio():
    key_size, query_size = torch.ones(16), torch.ones(16)
    key_size[3], query_size[5] = 4.0, 16.0
    balance, silent = moments_of(key_size, query_size)
    relative = balance / balance[:, :1]
    assert torch.allclose(relative[:, 3], torch.tensor(2.0), rtol=0.05)
    assert torch.allclose(relative[:, 5], torch.tensor(0.25), rtol=0.05)
    assert torch.allclose(balance.log().mean(1), torch.zeros(2), atol=0.05)
    assert torch.equal(silent, torch.ones(1, 32))


def test_silent_channels_stay_finite():
    balance, _ = moments_of(torch.tensor([0.0] + [1.0] * 15), torch.tensor([1.0] * 15 + [0.0]))
    assert bool((balance.isfinite() & (balance > 0)).all())


def forward(ids: Tensor, positions: Tensor, rows: Tensor, attend: Attend) -> Tensor:
    """A model without weights: keys and queries from the token ids."""
    for layer, shape in enumerate(LAYERS):
        torch.manual_seed(layer)
        table = torch.randn(50, 2 * shape.kv_heads, shape.head_dim)
        q_THD = table[ids]
        out = attend(layer, q_THD, q_THD[:, ::2], q_THD[:, ::2], 0.25)
        assert out.shape == q_THD.shape
    return torch.zeros(len(rows), 50)


def test_calibrate_reports_progress_and_is_repeatable():
    ids, seen = [i * 7 % 50 for i in range(1500)], []
    first = calibrate(forward, ids, LAYERS, 8, lambda done, of: seen.append((done, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    second = calibrate(forward, ids, LAYERS, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_calibrate_needs_two_pages():
    with pytest.raises(InvalidRequest, match="15 tokens to calibrate with; at least 16"):
        calibrate(forward, [1] * 15, LAYERS, 8)


def test_first_writer_wins(tmp_path: Path):
    path = tmp_path / "deep" / "balance.safetensors"
    assert load_balance(path, "a") is None
    first = save_balance(path, "a", [torch.full((2, 16), 2.0), torch.full((1, 32), 0.5)])
    second = save_balance(path, "a", [torch.ones(2, 16), torch.ones(1, 32)])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], torch.full((2, 16), 2.0))
    assert [p.name for p in path.parent.iterdir()] == ["balance.safetensors"]


def test_foreign_balance_is_refused(tmp_path: Path):
    save_balance(tmp_path / "b", "a", [torch.ones(1, 8)])
    with pytest.raises(Corrupt, match="not a balance of this model"):
        load_balance(tmp_path / "b", "other")


def test_text_is_long_enough():
    assert len(TEXT.split()) > 1300


def test_made_once_by_workers_that_start_together(tmp_path: Path):
    path, texts, shares = balance_path(tmp_path / "deep", "abc", 8), [], []

    def encode(text: str) -> list[int]:
        texts.append(text)
        time.sleep(0.2)
        return [i * 7 % 50 for i in range(100)]

    def noting(ids: Tensor, positions: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        def attend_and_note(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            out = attend(layer, q, k, v, scale)
            shares.append(calibrated_share())
            return out

        return forward(ids, positions, rows, attend_and_note)

    def start(_: int) -> list[Tensor]:
        return ensure_balance(path, "abc", noting, encode, LAYERS, 8)

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(start, range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert texts == [TEXT]
    assert shares == [0.5, 1.0]
    assert calibrated_share() is None


def test_a_file_that_is_given_is_used(tmp_path: Path):
    def encode(text: str) -> list[int]:
        raise AssertionError("calibrated")

    given, missing = tmp_path / "given.safetensors", str(tmp_path / "missing")
    saved = save_balance(given, "abc", [torch.full((2, 16), 2.0), torch.full((1, 32), 0.5)])
    found = ensure_balance(tmp_path / "own", "abc", forward, encode, LAYERS, 8, str(given))
    assert all(torch.equal(a, b) for a, b in zip(saved, found, strict=True))
    with pytest.raises(InvalidRequest, match=r"no balance file .*missing; `isthmus calibrate MODEL --out"):
        ensure_balance(tmp_path / "own", "abc", forward, encode, LAYERS, 8, missing)
    with pytest.raises(Corrupt, match="not a balance of this model"):
        ensure_balance(tmp_path / "own", "other", forward, encode, LAYERS, 8, str(given))

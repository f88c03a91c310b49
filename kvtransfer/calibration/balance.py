"""Calibration of the balance: which key channels the queries care about.

The codec's error is spread evenly over the channels of the balanced keys k / b, so that the variance of the
error of a score is proportional to sum (b_c q_c)² · sum (k_c / b_c)², k taken from its page's mean. The
product is least at

    b_c = (E[(k - mean)_c²] / E[q_c²])^(1/4),

q over the query heads of the group. Only ratios between channels matter: b is scaled to geometric mean 1,
and rounded to a sixteenth of an octave, so that machines whose sums differ in their last bits find the same
balance.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor

from ...kernels.attention.dense import Span, ragged_attention
from ...kernels.shapes import LayerShape
from ...proto.errors import Corrupt, InvalidRequest
from .progress import noted
from .text import TEXT

CALIBRATION_VERSION = 2
WINDOW_TOKENS = 1024  # of one forward

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
Forward = Callable[[Tensor, Tensor, Tensor, Attend], Tensor]  # `Model.forward`

_STEPS = 16
_FLOOR = 1e-6  # of the mean: a channel that was silent in the text must not get all or none of the precision


class Moments:
    """Second moments of keys and queries, by layer; feed it from an `attend` callback, then take
    `balance`."""

    def __init__(self, layers: Sequence[LayerShape], page_tokens: int) -> None:
        self._page = page_tokens
        self._keys = [torch.zeros(s.kv_heads, s.head_dim, dtype=torch.float64) for s in layers]
        self._queries = [torch.zeros_like(k) for k in self._keys]

    def add(self, layer: int, q_THD: Tensor, k_THD: Tensor) -> None:
        """Queries [T, query heads, D] and keys [T, KV heads, D] of one sequence from its first token on.

        The first page is left out (it is never packed, and its first tokens are unlike all others), and so
        is what does not fill a page.
        """
        end = k_THD.shape[0] // self._page * self._page
        if end <= self._page:
            return
        heads, dim = self._keys[layer].shape
        k = k_THD[self._page : end].double().view(-1, self._page, heads, dim)
        q = q_THD[self._page : end].double().view(-1, heads, q_THD.shape[1] // heads, dim)
        self._keys[layer] += (k - k.mean(1, keepdim=True)).square().sum((0, 1)).cpu()
        self._queries[layer] += q.square().sum((0, 2)).cpu()

    def balance(self) -> list[Tensor]:
        """For each layer float32 [KV heads, D], geometric mean near 1; all ones for layers that saw
        nothing."""
        return [_balance(k, q) for k, q in zip(self._keys, self._queries, strict=True)]


def _balance(keys_HD: Tensor, queries_HD: Tensor) -> Tensor:
    ratio = _floored(keys_HD) / _floored(queries_HD)
    log = ratio.log2() / 4
    return from_steps(((log - log.mean(1, keepdim=True)) * _STEPS).round().to(torch.int8))


def from_steps(steps_HD: Tensor) -> Tensor:
    """The balance, float32, of whole sixteenths of an octave."""
    return (steps_HD.double() / _STEPS).exp2().float()


def to_steps(balance_HD: Tensor) -> Tensor:
    """int8 sixteenths of an octave."""
    return (balance_HD.double().log2() * _STEPS).round().to(torch.int8)


def _floored(moment_HD: Tensor) -> Tensor:
    mean = moment_HD.mean(1, keepdim=True)
    return torch.where(mean > 0, torch.maximum(moment_HD, mean * _FLOOR), torch.ones_like(moment_HD))


def calibrate(
    forward: Forward,
    token_ids: Sequence[int],
    layers: Sequence[LayerShape],
    page_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """The balance of a model from one forward per WINDOW_TOKENS of a text; `progress(layers done, layers in
    all)`.

    InvalidRequest where the text has less than two pages: nothing would be learned from it.
    """
    if len(token_ids) < 2 * page_tokens:
        raise InvalidRequest(f"{len(token_ids)} tokens to calibrate with; at least {2 * page_tokens} are needed")
    moments = Moments(layers, page_tokens)
    windows = [token_ids[i : i + WINDOW_TOKENS] for i in range(0, len(token_ids), WINDOW_TOKENS)]
    for number, window in enumerate(windows):
        total = len(window)
        span = Span(row=0, new=total, past=0, slot_ranges=((0, total),))

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, span: Span = span, number: int = number
        ) -> Tensor:
            moments.add(layer, q, k)
            if progress is not None:
                progress(number * len(layers) + layer + 1, len(windows) * len(layers))
            return ragged_attention(q, k, v, [span], scale, layers[layer].window)

        forward(torch.tensor(window), torch.arange(total), torch.tensor([0]), attend)
    return moments.balance()


def balance_path(folder: Path, fingerprint: str, page_tokens: int) -> Path:
    """Where the balance of a model lies in the folder of converted models."""
    return folder / f"balance-{fingerprint}-{page_tokens}-{CALIBRATION_VERSION}.safetensors"


def save_balance(path: Path, fingerprint: str, balance: Sequence[Tensor]) -> list[Tensor]:
    """Writes a balance unless the file is there, and returns what the file holds: the first of several
    writers wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"layer.{i:04d}": to_steps(b) for i, b in enumerate(balance)}
    data = safetensors.torch.save(tensors, {"fingerprint": fingerprint, "version": str(CALIBRATION_VERSION)})
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
    saved = load_balance(path, fingerprint)
    assert saved is not None
    return saved


def load_balance(path: Path, fingerprint: str) -> list[Tensor] | None:
    """For each layer float32 [KV heads, D]; None where there is no file, Corrupt where it is of another
    model."""
    if not path.exists():
        return None
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata() or {}
        if about.get("fingerprint") != fingerprint or about.get("version") != str(CALIBRATION_VERSION):
            raise Corrupt(f"{path} is not a balance of this model; remove it to have it made anew")
        return [from_steps(file.get_tensor(name)) for name in sorted(file.keys())]


def ensure_balance(
    path: Path,
    fingerprint: str,
    forward: Forward,
    encode: Callable[[str], list[int]],
    layers: Sequence[LayerShape],
    page_tokens: int,
    given: str | None = None,
) -> list[Tensor]:
    """The balance in the file `given`, if any, or else at `path`, or else one that is made from the text that the
    project ships, and kept there. `calibrated_share` is how far that is.

    Of several workers that find the file missing one makes it, and the others wait. InvalidRequest where the file
    `given` is missing, Corrupt where it is of another model.
    """
    if given is not None:
        found = load_balance(Path(given), fingerprint)
        if found is None:
            raise InvalidRequest(f"there is no balance file {given}; `isthmus calibrate MODEL --out {given}` writes it")
        return found
    found = load_balance(path, fingerprint)
    if found is not None:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        found = load_balance(path, fingerprint)
        if found is not None:
            return found
        with noted() as progress:
            balance = calibrate(forward, encode(TEXT), layers, page_tokens, progress)
        return save_balance(path, fingerprint, balance)

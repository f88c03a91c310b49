"""How a codec is judged: forwards in which every key and value has been through it.

Letters of tensor shapes: T tokens, H heads, D head dimension, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.kernels.attention.dense import Span, ragged_attention
from isthmus.kvtransfer.codecs.registry import PageCodec
from isthmus.model.model import Model

SINK_TOKENS = 4  # stay raw in the protocol `all`
_CORRELATED_QUERIES = 64


def round_trip(codec: PageCodec, layer: int, k_THD: Tensor, v_THD: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Full pages through the codec and back."""
    return codec.decode(layer, codec.encode(layer, k_THD, v_THD), k_THD.dtype)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


@dataclass
class Correlation:
    """Correlation of attention logits before and after the codec, by layer."""

    by_layer: dict[int, list[float]] = field(default_factory=dict)

    def add(self, layer: int, q_THD: Tensor, k_THD: Tensor, packed_THD: Tensor) -> None:
        """Logits of the last queries over all packed keys; a head's mean per query is no information."""
        q = q_THD[-_CORRELATED_QUERIES:].float()
        groups = q.shape[1] // k_THD.shape[1]
        pairs = []
        for keys in (k_THD, packed_THD):
            logits = torch.einsum("thd,shd->hts", q, keys.float().repeat_interleave(groups, 1))
            pairs.append((logits - logits.mean(-1, keepdim=True)).flatten())
        cosine = torch.nn.functional.cosine_similarity(pairs[0], pairs[1], dim=0)
        self.by_layer.setdefault(layer, []).append(float(cosine))

    def worst(self) -> float:
        return min(sum(v) / len(v) for v in self.by_layer.values())


def logits_all(model: Model, ids_T: Tensor, codec: PageCodec | None, page: int, seen: Correlation) -> Tensor:
    """[T, V]: everything but the first SINK_TOKENS packed, in one forward. None: keys and values only
    rounded to bf16."""
    total = len(ids_T)
    span = Span(row=0, new=total, past=0, slot_ranges=((0, total),))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = _bf16(k), _bf16(v)
        if codec is not None and codec.packs:
            raw = k
            k, v = pack_from(codec, layer, k, v, page, SINK_TOKENS)
            seen.add(layer, q, raw[SINK_TOKENS:], k[SINK_TOKENS:])
        return ragged_attention(q, k, v, [span], scale, model.layers[layer].window)

    return model.forward(ids_T, torch.arange(total), torch.arange(total), attend)


def pack_from(
    codec: PageCodec, layer: int, k_THD: Tensor, v_THD: Tensor, page: int, start: int
) -> tuple[Tensor, Tensor]:
    """Copies whose tokens from `start` on have been packed; the last, partial page is packed with tokens
    before it."""
    k_out, v_out = k_THD.clone(), v_THD.clone()
    total = k_THD.shape[0]
    full = start + (total - start) // page * page
    for first, rows in ((start, slice(start, full)), (total - page, slice(full, total))):
        if rows.start < rows.stop:
            k, v = codec.decode(
                layer, codec.encode(layer, k_THD[first : rows.stop], v_THD[first : rows.stop]), k_THD.dtype
            )
            k_out[rows], v_out[rows] = k[rows.start - first :], v[rows.start - first :]
    return k_out, v_out


class Cache:
    """The KV of one sequence as the cluster holds it: first page, last full page and partial page raw."""

    def __init__(self, model: Model, codec: PageCodec | None, page: int, capacity: int) -> None:
        self.model, self.codec, self.page, self.length = model, codec, page, 0
        self.keys = [torch.zeros(capacity, s.kv_heads, s.head_dim) for s in model.layers]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.unpacked_keys: list[Tensor] | None = None
        self._packed_to = page

    def keep_unpacked_keys(self) -> None:
        """From now on the keys stay here as they were before packing, to be compared with."""
        self.unpacked_keys = [k.clone() for k in self.keys]

    def fork(self, codec: PageCodec | None) -> "Cache":
        """A copy of an unpacked cache, to be packed by another codec."""
        other = Cache.__new__(Cache)
        other.model, other.codec, other.page, other.length = self.model, codec, self.page, self.length
        other.keys, other.values = [k.clone() for k in self.keys], [v.clone() for v in self.values]
        other.unpacked_keys, other._packed_to = None, self._packed_to
        return other

    def pack(self) -> None:
        """Packs every page that may be: all full ones but the first and the last."""
        end = (self.length // self.page - 1) * self.page
        if self.codec is None or not self.codec.packs or end <= self._packed_to:
            return
        rows = slice(self._packed_to, end)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys[rows], values[rows] = round_trip(self.codec, layer, keys[rows], values[rows], self.page)
        self._packed_to = end


def step(
    caches: Sequence[Cache], ids: Sequence[Tensor], rows: Sequence[int] | None = None, seen: Correlation | None = None
) -> Tensor:
    """Logits of the new tokens of several sequences (of `rows` of the batch, or of all), which join their
    caches. `seen` hears of the new queries of caches that keep their unpacked keys."""
    model = caches[0].model
    starts = [0]
    for one in ids:
        starts.append(starts[-1] + len(one))
    for cache in caches:
        cache.pack()
    positions = torch.cat([torch.arange(c.length, c.length + len(i)) for c, i in zip(caches, ids, strict=True)])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        outs = []
        for cache, start, one in zip(caches, starts, ids, strict=False):
            new = slice(start, start + len(one))
            end = cache.length + len(one)
            cache.keys[layer][cache.length : end] = _bf16(k[new])
            cache.values[layer][cache.length : end] = _bf16(v[new])
            if cache.unpacked_keys is not None:
                cache.unpacked_keys[layer][cache.length : end] = cache.keys[layer][cache.length : end]
                if seen is not None:
                    seen.add(layer, q[new], cache.unpacked_keys[layer][:end], cache.keys[layer][:end])
            span = Span(row=0, new=len(one), past=cache.length, slot_ranges=((0, end),), output=len(one) == 1)
            window = model.layers[layer].window
            outs.append(ragged_attention(q[new], cache.keys[layer], cache.values[layer], [span], scale, window))
        return torch.cat(outs)

    wanted = torch.arange(starts[-1]) if rows is None else torch.tensor(rows)
    logits = model.forward(torch.cat(list(ids)), positions, wanted, attend)
    for cache, one in zip(caches, ids, strict=True):
        cache.length += len(one)
    return logits


def add_served(
    sums: "Divergence",
    seen: Correlation,
    reference_TV: Tensor,
    model: Model,
    ids_T: Tensor,
    codec: PageCodec | None,
    page: int,
) -> None:
    """A page of queries at a time; pages are packed as they fill, and all that follows sees them packed. The logits
    of the last page's queries are correlated with those over the keys before packing."""
    cache = Cache(model, codec, page, len(ids_T))
    cache.keep_unpacked_keys()
    for start in range(0, len(ids_T), page):
        last = start + page >= len(ids_T)
        logits = step([cache], [ids_T[start : start + page]], seen=seen if last else None)
        sums.add(reference_TV[start : start + page], logits, ids_T[start : start + page + 1])


@dataclass
class Divergence:
    """Sums over positions; `add` compares logits with those of the reference, for these tokens and the one after."""

    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)

    def add(self, reference_TV: Tensor, logits_TV: Tensor, ids_T: Tensor) -> None:
        for start in range(0, len(reference_TV), 64):
            rows = slice(start, start + 64)
            p, q = reference_TV[rows].log_softmax(-1), logits_TV[rows].log_softmax(-1)
            self.kl.append((p.exp() * (p - q)).sum(-1))
            self.same.append((p.argmax(-1) == q.argmax(-1)).float())
            following = ids_T[start + 1 : start + 65]
            self.loss.append(-q[: len(following)].gather(1, following[:, None])[:, 0])

    def summary(self) -> dict[str, float]:
        kl, same, loss = torch.cat(self.kl), torch.cat(self.same), torch.cat(self.loss)
        return {
            "kl_mean": float(kl.mean()),
            "kl_p99": float(kl.quantile(0.99)),
            "top1": float(same.mean()),
            "ppl": float(loss.mean().exp()),
        }

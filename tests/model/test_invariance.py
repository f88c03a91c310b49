"""A token's KV and logits have the same bits whatever shares its steps and wherever its prompt is cut."""

from collections.abc import Sequence

import pytest
import torch
from models import model_path
from torch import Tensor

from isthmus.kernels.attention.dense import Span, ragged_attention
from isthmus.kernels.cpu.half_gemm import has_half_tiles
from isthmus.model.load.loader import load_model
from isthmus.model.model import Model

PROMPT, OUTPUT, MATE = 330, 40, 150  # tokens


class Cache:
    """KV of two sequences, the second one's behind the first one's."""

    def __init__(self, model: Model) -> None:
        self._model, self.first_slot, self.done = model, (0, 512), [0, 0]
        shape = (len(model.layers), 1024, model.layers[0].kv_heads, model.layers[0].head_dim)
        self.keys, self.values = torch.zeros(2, *shape)

    def step(self, parts: Sequence[tuple[int, Sequence[int]]], *, output: bool = False) -> Tensor:
        """Computes the next tokens of (sequence, tokens) parts; logits of the last token of the last part."""
        tokens, places, slots, spans = list[int](), list[int](), list[int](), list[Span]()
        for sequence, new in parts:
            past, slot = self.done[sequence], self.first_slot[sequence]
            end = past + len(new)
            spans.append(Span(len(tokens), len(new), past, ((slot, end),), output=output and sequence == 0))
            tokens += new
            places += range(past, end)
            slots += range(slot + past, slot + end)
            self.done[sequence] = end

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            self.keys[layer, slots], self.values[layer, slots] = k, v
            return ragged_attention(q, self.keys[layer], self.values[layer], spans, scale, None)

        rows = torch.tensor([len(tokens) - 1])
        return self._model.forward(torch.tensor(tokens), torch.tensor(places), rows, attend)[0]


@pytest.mark.skipif(not has_half_tiles(), reason="this CPU lacks the instructions")
@pytest.mark.parametrize("name", ["tiny-llama", "smollm2-135m"])
def test_alone_or_not_whole_or_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, on weights of bf16: a CPU that multiplies bf16 would compute in that, and its sums go by batches."""
    monkeypatch.setattr("isthmus.model.load.loader.computes_bf16", lambda: False)
    model = load_model(model_path(name), dtype="bf16", device="cpu")
    drawn = torch.randint(3, model.vocab_size, (PROMPT + OUTPUT + MATE,), generator=torch.Generator().manual_seed(3))
    prompt, output, mate = (part.tolist() for part in drawn.split([PROMPT, OUTPUT, MATE]))

    alone = Cache(model)
    first = alone.step([(0, prompt)])
    last = [alone.step([(0, [token])], output=True) for token in output][-1]

    shared = Cache(model)
    shared.step([(1, mate[:60]), (0, prompt[:64])])
    shared.step([(0, prompt[64:256]), (1, mate[60:100])])
    assert torch.equal(shared.step([(0, prompt[256:])]), first)
    shared.step([(0, output[:30]), (1, mate[100:])], output=True)
    assert torch.equal(shared.step([(0, output[30:])], output=True), last)

    assert torch.equal(shared.keys[:, : PROMPT + OUTPUT], alone.keys[:, : PROMPT + OUTPUT])
    assert torch.equal(shared.values[:, : PROMPT + OUTPUT], alone.values[:, : PROMPT + OUTPUT])

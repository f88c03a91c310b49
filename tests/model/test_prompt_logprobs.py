"""Log-probabilities of a prompt, chunk by chunk: those of transformers, whatever the size of chunks and blocks."""

from itertools import pairwise

import pytest
import torch
from models import TINY_MODELS, model_path
from naive_attention import NaiveCache
from transformers import AutoModelForCausalLM

from isthmus.model import prompt_logprobs
from isthmus.model.hidden import HiddenStates
from isthmus.model.load.loader import load_model
from isthmus.model.prompt_logprobs import ScoredTokens, score_chunk

PROMPT = torch.randint(3, 500, (70,), generator=torch.Generator().manual_seed(3)).tolist()
NONE = torch.tensor([], dtype=torch.long)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("cuts", [(0, 70), (0, 1, 33, 69, 70)])
def test_scored_chunks_are_those_of_transformers(
    name: str, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(model_path(name), dtype="fp32", device="cpu")
    monkeypatch.setattr(prompt_logprobs, "BLOCK_BYTES", 10 * 4 * model.vocab_size)  # ten tokens at once
    sizes = list[int]()
    logits = HiddenStates.logits
    monkeypatch.setattr(HiddenStates, "logits", lambda self, rows: sizes.append(len(rows)) or logits(self, rows))
    cache, made = NaiveCache(model.layers, 2), list[ScoredTokens]()
    for start, end in pairwise(cuts):
        ahead = 3  # tokens of another sequence stand before the chunk
        positions = torch.cat([torch.arange(start, start + ahead), torch.arange(start, end)])
        tokens = torch.tensor([7] * ahead + PROMPT[start:end])
        sequences = torch.tensor([1] * ahead + [0] * (end - start))

        def score(hidden: HiddenStates, start: int = start, end: int = end) -> None:
            made.append(score_chunk(hidden, 3, PROMPT, start, end, 5, model.vocab_size))

        model.forward(tokens, positions, NONE, cache.attend_for(sequences, positions), score)
    assert max(sizes) == 10
    assert [part.first for part in made] == [start + 1 for start in cuts[:-1]]
    found = [token for part in made for token in part.logprobs]
    net = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.inference_mode():
        own = net(torch.tensor([PROMPT]), use_cache=False).logits[0].log_softmax(-1)[:-1]
    expected = own.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([t.logprob for t in found]), expected, rtol=1e-4, atol=1e-3)
    best = torch.tensor([[top.logprob for top in token.top] for token in found])
    torch.testing.assert_close(best, own.topk(5).values, rtol=1e-4, atol=1e-3)


def test_the_head_is_as_it_was_afterwards() -> None:
    model = load_model(model_path("tiny-llama"), dtype="fp32", device="cpu")
    kept: list[HiddenStates] = []
    positions = torch.arange(5)

    def run() -> torch.Tensor:
        attend = NaiveCache(model.layers, 1).attend_for(torch.zeros(5, dtype=torch.long), positions)
        return model.forward(torch.tensor(PROMPT[:5]), positions, positions, attend, kept.append)

    whole = run()
    torch.testing.assert_close(kept[0].logits(torch.tensor([4, 0])), whole[[4, 0]])
    assert "forward" not in model.net.base_model.__dict__
    assert not model.net.base_model._forward_hooks
    assert torch.equal(run(), whole)

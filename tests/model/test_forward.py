"""`Model.forward` on ragged batches gives the logits that transformers gives for each sequence alone."""

import threading

import pytest
import torch
from models import REAL_MODELS, TINY_MODELS, WINDOW, model_path
from naive_attention import NaiveCache
from transformers import AutoModelForCausalLM

from isthmus.kernels.shapes import LayerShape
from isthmus.model.load.loader import load_model
from isthmus.model.model import Model

# Tokens of three sequences in three forwards: a chunked prompt, one that joins late, one token at a time.
SCHEDULE = (
    ((0, 40), (1, 7)),
    ((2, 65), (0, 60), (1, 1)),
    ((1, 1), (0, 1), (2, 1)),
)


@pytest.fixture(params=[*TINY_MODELS, *REAL_MODELS])
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(model_path(request.param), dtype="fp32", device="cpu")


def own_logits(model: Model, prompts: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """What transformers, with attention and weights of its own, makes of each sequence alone, at some places."""
    net = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.inference_mode():
        return [
            net(torch.tensor([token_ids]), use_cache=False, logits_to_keep=torch.tensor(places)).logits[0]
            for token_ids, places in prompts
        ]


def test_a_ragged_batch_has_the_logits_of_each_sequence_alone(model: Model) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = [sum(n for batch in SCHEDULE for s, n in batch if s == sequence) for sequence in range(3)]
    prompts = [torch.randint(3, 500, (length,), generator=generator) for length in lengths]
    cache, done, found = NaiveCache(model.layers, 3), [0, 0, 0], [[], [], []]
    for batch in SCHEDULE:
        tokens = torch.cat([prompts[s][done[s] : done[s] + n] for s, n in batch])
        positions = torch.cat([torch.arange(done[s], done[s] + n) for s, n in batch])
        sequences = torch.cat([torch.full((n,), s) for s, n in batch])
        last = torch.tensor([n for _, n in batch]).cumsum(0) - 1
        logits = model.forward(tokens, positions, last, cache.attend_for(sequences, positions))
        assert logits.dtype == torch.float32
        assert logits.shape == (len(batch), model.vocab_size)
        for (sequence, count), row in zip(batch, logits, strict=True):
            done[sequence] += count
            found[sequence].append((done[sequence] - 1, row))
    assert cache.calls == [*range(len(model.layers))] * len(SCHEDULE)
    wanted = [(prompt.tolist(), [place for place, _ in rows]) for prompt, rows in zip(prompts, found, strict=True)]
    for rows, expected in zip(found, own_logits(model, wanted), strict=True):
        for (_, row), own in zip(rows, expected, strict=True):
            torch.testing.assert_close(row, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


def test_a_window_of_real_weights_cuts_where_transformers_cuts() -> None:
    model = load_model("gemma3-270m", dtype="fp32", device="cpu")
    assert [layer.window for layer in model.layers] == ([512] * 5 + [None]) * 3
    tokens = torch.randint(3, 20_000, (600,), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(600)
    attend = NaiveCache(model.layers, 1).attend_for(torch.zeros(600, dtype=torch.long), positions)
    rows = torch.tensor([511, 512, 599])
    (own,) = own_logits(model, [(tokens.tolist(), rows.tolist())])
    torch.testing.assert_close(model.forward(tokens, positions, rows, attend), own, rtol=1e-4, atol=1e-3)


def test_no_rows_wanted_gives_no_logits() -> None:
    model = load_model(model_path("tiny-llama"), dtype="fp32", device="cpu")
    cache = NaiveCache(model.layers, 1)
    attend = cache.attend_for(torch.tensor([0, 0]), torch.tensor([0, 1]))
    logits = model.forward(torch.tensor([5, 6]), torch.tensor([0, 1]), torch.tensor([], dtype=torch.long), attend)
    assert logits.shape == (0, model.vocab_size)
    assert cache.calls == [0, 1, 2]


def test_models_run_side_by_side_in_threads() -> None:
    names = ("tiny-llama", "tiny-mistral", "tiny-gemma3")
    models = [load_model(model_path(name), dtype="fp32", device="cpu") for name in names]
    tokens, positions = torch.arange(3, 73), torch.arange(70)

    def run(model: Model) -> torch.Tensor:
        attend = NaiveCache(model.layers, 1).attend_for(torch.zeros(70, dtype=torch.long), positions)
        return model.forward(tokens, positions, torch.tensor([69]), attend)

    alone = [run(model) for model in models]
    together: list[list[torch.Tensor]] = [[] for _ in models]
    start = threading.Barrier(len(models))

    def keep_running(index: int) -> None:
        start.wait()
        together[index] = [run(models[index]) for _ in range(10)]

    threads = [threading.Thread(target=keep_running, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, together, strict=True):
        assert len(found) == 10
        assert all(torch.equal(logits, expected) for logits in found)


def test_layers_have_the_windows_of_the_config() -> None:
    def windows(name: str) -> list[LayerShape]:
        return list(load_model(model_path(name), dtype="fp32", device="cpu").layers)

    sliding = LayerShape(kv_heads=1, head_dim=16, window=WINDOW)
    full = LayerShape(kv_heads=1, head_dim=16, window=None)
    assert windows("tiny-gemma3") == [sliding, full, sliding, full]
    assert windows("tiny-mistral") == [LayerShape(kv_heads=2, head_dim=16, window=WINDOW)] * 3
    assert windows("tiny-qwen3") == [LayerShape(kv_heads=2, head_dim=32, window=None)] * 3

"""The baseline of transformers is bounded: it is taken of fewer tokens where it is too slow."""

import pytest
from models import model_path
from support.baseline import TRIED_TOKENS, Baseline

PROMPT = list(range(3, 3 + 8 * TRIED_TOKENS))


def test_within_the_bound_nothing_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    baseline = Baseline(model_path("tiny-llama"), "float32", 1, limit_s=600)
    assert len(baseline.decode([[1, 2, 3], [4, 5, 6]], 6)) == 5
    tokens, seconds = baseline.prefill(PROMPT)
    assert tokens == len(PROMPT) and seconds > 0
    assert capsys.readouterr().err == ""


def test_past_the_bound_two_steps_and_the_shortest_prompt_are_left(capsys: pytest.CaptureFixture[str]) -> None:
    baseline = Baseline(model_path("tiny-llama"), "float32", 1, limit_s=0)
    assert len(baseline.decode([[1, 2, 3], [4, 5, 6]], 20)) == 2
    tokens, _ = baseline.prefill(PROMPT)
    assert tokens == TRIED_TOKENS
    said = capsys.readouterr().err
    assert "2 steps of 19" in said
    assert f"{TRIED_TOKENS} of {len(PROMPT)} tokens" in said

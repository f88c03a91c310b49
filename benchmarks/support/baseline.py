"""transformers on the same weights, in the benchmark's process: what ours is compared with.

It can be slow beyond use: bf16 on a CPU that does not multiply it takes minutes for a prompt. So every figure has a
bound in seconds, past which it is taken of fewer tokens.
"""

import time
from itertools import pairwise
from typing import Any

from .report import say

TRIED_TOKENS = 16  # of the prompt that tells how long others will take


class Baseline:
    """A model of transformers in one dtype, with its own attention and `generate`."""

    def __init__(self, path: str, dtype: str, threads: int, limit_s: float) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        self._name, self._limit_s = dtype, limit_s
        self._ms_per_token = 0.0  # of a short prompt, once tried
        self._net: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Seconds of each step of `generate` after its first token; where `limit_s` is over, fewer, but two."""
        ids = self._torch.tensor(prompts)
        clock = _Clock(self._limit_s)
        self._net.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
            stopping_criteria=[clock.is_over],
        )
        times = clock.times[1:]  # the first call brings the prompt
        steps = [after - before for before, after in pairwise(times)]
        if len(steps) < new_tokens - 1:
            say(f"baseline {self._name}: {len(steps)} steps of {new_tokens - 1} in {self._limit_s:.0f} s, the bound")
        return steps

    def prefill(self, prompt: list[int]) -> tuple[int, float]:
        """Tokens and seconds of one forward that fills a cache; of a shorter prompt where it would exceed `limit_s`."""
        if not self._ms_per_token:
            self._ms_per_token = 1e3 * self._forward(prompt[:TRIED_TOKENS]) / len(prompt[:TRIED_TOKENS])
        tokens = len(prompt)
        while tokens > TRIED_TOKENS and tokens * self._ms_per_token > 1e3 * self._limit_s:
            tokens //= 2
        if tokens < len(prompt):
            say(f"baseline {self._name}: {tokens} of {len(prompt)} tokens, within {self._limit_s:.0f} s")
        return tokens, self._forward(prompt[:tokens])

    def _forward(self, prompt: list[int]) -> float:
        begun = time.perf_counter()
        with self._torch.inference_mode():
            self._net(self._torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun


class _Clock:
    """A streamer of transformers that notes when each step's tokens come, and says when it has been enough."""

    def __init__(self, limit_s: float) -> None:
        self.times: list[float] = []
        self._end_s = time.perf_counter() + limit_s

    def put(self, _tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

    def is_over(self, ids: Any, _scores: Any, **_: Any) -> Any:
        """For each row, whether to stop: the time is over, and two steps are there."""
        import torch

        return ids.new_full((len(ids),), len(self.times) > 2 and time.perf_counter() > self._end_s, dtype=torch.bool)

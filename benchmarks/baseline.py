"""transformers on the same weights, in the benchmark's process: what ours is compared with."""

import time
from itertools import pairwise
from typing import Any


class Baseline:
    """A model of transformers in one dtype, with its own attention and `generate`."""

    def __init__(self, path: str, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        self._net: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Seconds of each step of `generate` after its first token."""
        ids = self._torch.tensor(prompts)
        clock = _Clock()
        self._net.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
        )
        times = clock.times[1:]  # the first call brings the prompt
        return [after - before for before, after in pairwise(times)]

    def prefill(self, prompt: list[int]) -> float:
        """Seconds of one forward that fills a cache."""
        begun = time.perf_counter()
        with self._torch.inference_mode():
            self._net(self._torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun


class _Clock:
    """A streamer of transformers that notes when each step's tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

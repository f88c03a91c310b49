"""How many tokens of prompts a step computes at most, where the settings leave that open.

Nobody enters a step that runs: larger ones waste less, and whoever comes next waits for longer. On a CPU, where a step
of 512 tokens takes a small model more than a second, steps of 256 were measured to take 3 to 9 % more time a token
(docs/reuse.md).
"""

import torch

GPU_TOKENS, CPU_TOKENS = 512, 256


def chunk_tokens_for(device: torch.device, page_tokens: int) -> int:
    """Tokens of one step: whole pages, one at least."""
    tokens = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return max(page_tokens, tokens - tokens % page_tokens)

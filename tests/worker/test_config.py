import pytest
import torch

from isthmus.worker.config import chunk_tokens_for


@pytest.mark.parametrize(
    ("device", "page_tokens", "tokens"), [("cpu", 64, 256), ("cpu", 48, 240), ("cpu", 1024, 1024), ("cuda", 64, 512)]
)
def test_whole_pages_and_one_at_least(device: str, page_tokens: int, tokens: int) -> None:
    assert chunk_tokens_for(torch.device(device), page_tokens) == tokens

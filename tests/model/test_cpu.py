import pytest
import torch
from models import model_path
from torch import nn
from transformers import AutoModelForCausalLM

from isthmus.model.cpu import GatedMlp, PackedLinear, speed_up


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-phi3", "tiny-gemma3", "tiny-mixtral"])
def test_a_prepared_model_computes_the_same(name: str) -> None:
    path = model_path(name)
    plain, fast = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2))
    speed_up(fast)
    for tokens in (1, 3, 4, 50):
        ids = torch.arange(tokens)[None]
        with torch.inference_mode():
            torch.testing.assert_close(fast(ids).logits, plain(ids).logits, atol=2e-5, rtol=1e-4)


def test_gate_and_up_become_one_and_all_layers_are_packed() -> None:
    net = AutoModelForCausalLM.from_pretrained(model_path("tiny-llama"), dtype=torch.float32)
    speed_up(net)
    kinds = [type(module) for module in net.modules()]
    assert kinds.count(GatedMlp) == 3
    assert kinds.count(PackedLinear) == 3 * (4 + 2) + 1
    assert nn.Linear not in kinds


def test_a_packed_layer_keeps_its_bias_in_both_layouts() -> None:
    linear = nn.Linear(64, 48)
    packed = PackedLinear(linear)
    for rows in (1, 3, 4, 9):
        x = torch.randn(1, rows, 64)
        with torch.inference_mode():
            torch.testing.assert_close(packed(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 7])
def test_bf16_is_packed_too(rows: int) -> None:
    linear = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    x = torch.randn(1, rows, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), atol=2e-2, rtol=2e-2)

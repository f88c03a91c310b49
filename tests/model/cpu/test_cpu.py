"""What a CPU worker does to a model: fused and packed modules that compute the same."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import model_path
from torch import nn
from transformers import AutoModelForCausalLM

from isthmus.kernels.cpu.half_gemm import has_half_tiles
from isthmus.kernels.fast_paths import WrongSetting, compiles_allowed
from isthmus.model.cpu import speed_up as cpu
from isthmus.model.cpu.fused_layer import FusedLayer
from isthmus.model.cpu.fusion import FusedAttention, FusedNorm, GatedMlp
from isthmus.model.cpu.linear import BlockedLinear, HalfLinear, fits_half, has_blocked, packed_linear
from isthmus.model.cpu.speed_up import computes_bf16, speed_up
from isthmus.model.load.loader import load_model

needs_compiling = pytest.mark.skipif(not compiles_allowed(), reason="everything compiled is switched off")
needs_half_kernels = pytest.mark.skipif(not has_half_tiles(), reason="this CPU lacks the instructions")


def load(name: str, *, bf16_weights: bool = False) -> Any:
    dtype = torch.bfloat16 if bf16_weights else torch.float32
    return AutoModelForCausalLM.from_pretrained(model_path(name), dtype=dtype, attn_implementation="isthmus").float()


def logits(net: Any, tokens: int) -> torch.Tensor:
    """Of a forward in which every token sees itself alone."""
    from isthmus.model.attention import attending

    def see_oneself(_layer: int, q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1) + q * scale

    with torch.inference_mode(), attending(see_oneself):
        ids = torch.arange(tokens)[None]
        return net(input_ids=ids, position_ids=ids * 3, use_cache=False).logits


@pytest.mark.parametrize("bf16_weights", [False, True])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-phi3", "tiny-gemma3", "tiny-mixtral"])
def test_a_prepared_model_computes_the_same(name: str, bf16_weights: bool) -> None:
    plain, fast = (load(name, bf16_weights=bf16_weights) for _ in range(2))
    speed_up(fast)
    for tokens in (1, 3, 4, 50, 200):
        torch.testing.assert_close(logits(fast, tokens), logits(plain, tokens), atol=5e-5, rtol=1e-4)


@needs_compiling
@pytest.mark.parametrize(
    ("name", "norms", "mlps", "attentions"),
    [
        ("tiny-llama", 7, 3, 3),
        ("tiny-qwen2", 7, 3, 3),
        ("tiny-qwen3", 13, 3, 3),
        ("tiny-phi3", 7, 0, 0),  # its products are joined already
        ("tiny-mixtral", 7, 0, 3),
        ("tiny-gemma3", 25, 4, 4),
    ],
)
def test_what_is_fused(name: str, norms: int, mlps: int, attentions: int) -> None:
    net = load(name)
    speed_up(net)
    kinds = [type(module) for module in net.modules()]
    assert [kinds.count(kind) for kind in (FusedNorm, GatedMlp, FusedAttention)] == [norms, mlps, attentions]
    assert (nn.Linear in kinds) == (not has_blocked(torch.float32) and not has_half_tiles())


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's threads, one at first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def layers_of_two_calls(net: Any) -> int:
    return [type(module) for module in net.modules()].count(FusedLayer)


@needs_half_kernels
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("name", "layers"),
    [("tiny-llama", 3), ("tiny-qwen2", 0), ("tiny-qwen3", 0), ("tiny-mixtral", 0), ("tiny-gemma3", 0)],
)
def test_layers_of_two_calls(name: str, layers: int) -> None:
    net, plain = load(name, bf16_weights=True), load(name, bf16_weights=True)
    speed_up(net)
    assert layers_of_two_calls(net) == layers
    torch.testing.assert_close(logits(net, 150), logits(plain, 150), atol=5e-5, rtol=1e-4)


@needs_half_kernels
def test_a_layer_has_the_same_bits_on_one_thread_and_on_several(threads: Callable[[int], None]) -> None:
    net = load("tiny-llama", bf16_weights=True)
    speed_up(net)
    assert layers_of_two_calls(net) == 3
    alone = logits(net, 150)
    threads(2)
    assert torch.equal(logits(net, 150), alone)


@needs_half_kernels
@pytest.mark.parametrize("count", [1, 2])
def test_a_layer_that_does_more_is_not_taken(
    count: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = load("tiny-llama", bf16_weights=True)
    forward = type(net.model.layers[0]).forward
    monkeypatch.setattr(
        type(net.model.layers[0]), "forward", lambda self, *args, **kw: forward(self, *args, **kw) * 1.1
    )
    threads(count)
    speed_up(net)
    assert layers_of_two_calls(net) == 0


def test_a_replacement_that_differs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    net = load("tiny-llama")
    monkeypatch.setattr(GatedMlp, "forward", lambda self, x: self.down_proj(self.gate_up_proj(x).chunk(2, -1)[0]))
    speed_up(net)
    assert not [module for module in net.modules() if isinstance(module, GatedMlp)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 9, 161])
@pytest.mark.parametrize("kind", [BlockedLinear, HalfLinear])
@needs_half_kernels
def test_a_packed_layer_computes_the_same(kind: type[nn.Module], rows: int, bias: bool) -> None:
    layer = nn.Linear(64, 48, bias=bias)
    layer.weight.data = layer.weight.data.bfloat16().float()
    if kind is BlockedLinear and not has_blocked(torch.float32):
        pytest.skip("oneDNN's layout is not used on this machine")
    packed = packed_linear(layer) if kind is HalfLinear else BlockedLinear(layer)
    assert isinstance(packed, kind)
    x = torch.randn(1, rows, 64)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), layer(x), atol=1e-5, rtol=1e-5)


@needs_half_kernels
def test_a_row_of_a_half_layer_does_not_depend_on_the_others() -> None:
    layer = nn.Linear(576, 96)
    layer.weight.data = layer.weight.data.bfloat16().float()
    packed = packed_linear(layer)
    assert isinstance(packed, HalfLinear)
    x = torch.randn(600, 576)
    with torch.inference_mode():
        whole = packed(x)
        for first, end in ((0, 1), (3, 9), (100, 129), (7, 300), (599, 600)):
            assert torch.equal(packed(x[first:end]), whole[first:end])


@pytest.mark.parametrize("rows", [1, 7])
def test_bf16_is_packed_where_that_works_and_else_stays_plain(rows: int) -> None:
    layer = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    x = torch.randn(1, rows, 64, dtype=torch.bfloat16)
    packed = packed_linear(layer)
    assert (packed is not None) == has_blocked(torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close((packed or layer)(x), layer(x), atol=2e-2, rtol=2e-2)


@needs_half_kernels
def test_only_weights_that_fp16_holds_are_kept_in_it() -> None:
    weight = torch.randn(64, 64) * 0.02
    assert fits_half(weight.bfloat16().float())
    assert not fits_half(weight)
    assert not fits_half(weight.bfloat16().float() * 1e7)  # beyond fp16's greatest number
    assert not fits_half(weight.bfloat16().float() * 1e-6)  # below its smallest
    assert not fits_half(weight.bfloat16())


@needs_half_kernels
def test_bf16_weights_compute_in_fp32_where_the_cpu_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.model.load.loader.computes_bf16", lambda: False)
    model = load_model(model_path("tiny-llama"), dtype="bf16", device="cpu")
    assert (model.dtype, model.weight_dtype) == (torch.float32, torch.bfloat16)
    assert [type(m) for m in model.net.modules()].count(HalfLinear) == 3 * 4 + 1
    plain = load("tiny-llama", bf16_weights=True)
    torch.testing.assert_close(logits(model.net, 5), logits(plain, 5), atol=5e-5, rtol=1e-4)


def test_bf16_units_stay_unused_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = computes_bf16.__wrapped__
    monkeypatch.setattr(cpu, "_names_bf16_units", lambda: True)
    monkeypatch.setattr(cpu, "_bf16_is_native", lambda: True)
    monkeypatch.delenv(cpu.BF16_SETTING, raising=False)
    assert asked()
    monkeypatch.setenv(cpu.BF16_SETTING, "never")
    assert not asked()
    monkeypatch.setenv(cpu.BF16_SETTING, "no")
    with pytest.raises(WrongSetting, match="ISTHMUS_BF16 is 'no'; allowed: auto, never"):
        asked()

"""What cannot be exact in a ragged batch is refused when the model is loaded, with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import model_path
from support.tiny_model import make_tiny, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from isthmus.model import attention
from isthmus.model.load.loader import load_model, refuse_inexact
from isthmus.model.load.probe import probe_layers
from isthmus.proto.errors import InvalidRequest, NotFound

_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "first_k_dense_replace": 3}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("model_type", "differences", "reason"),
    [
        ("gemma2", {"head_dim": 16}, "needs 'softcap'"),
        ("gpt_oss", {"head_dim": 16} | _MOE, "needs 's_aux'"),
        ("deepseek_v3", _MLA, "keys of 192 and values of 128 dimensions"),
        ("gemma3_text", {"head_dim": 16, "use_bidirectional_attention": True}, "some other pattern than a causal"),
        ("bloom", {}, r"layers \[0, 1, 2\] do not use transformers' attention interface"),
        ("falcon", {}, "does not use transformers' attention interface"),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "does not run through transformers' attention interface"),
        ("diffllama", {}, "runs attention layer 0 twice"),
    ],
)
def test_refuses_attention_that_it_does_not_have(
    tmp_path: Path, model_type: str, differences: dict[str, Any], reason: str
) -> None:
    make_tiny(tiny_config(model_type, differences), tmp_path)
    with pytest.raises(InvalidRequest, match=reason):
        load_model(str(tmp_path), dtype="fp32", device="cpu")


@pytest.mark.parametrize(
    ("model_type", "differences", "reason"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type dynamic"),
        ("phi3", {"original_max_position_embeddings": 512, "rope_parameters": _LONGROPE}, "type longrope"),
        ("mamba", {}, "layers of type linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "layers of type conv"),
        ("llama4_text", {"head_dim": 16}, "layers of type chunked_attention"),
        ("t5", {}, "encoder-decoder"),
    ],
)
def test_refuses_by_config_before_weights_are_read(model_type: str, differences: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        refuse_inexact(tiny_config(model_type, differences))


@pytest.mark.parametrize(
    ("model_type", "differences", "reason"),
    [
        ("phi3", {"original_max_position_embeddings": 512, "rope_parameters": _LONGROPE}, "depends on other tokens"),
        ("lfm2", {"layer_types": ["full_attention", "conv", "full_attention"]}, r"layers \[1\] do not use"),
    ],
)
def test_the_probe_finds_by_itself_what_the_config_says(
    model_type: str, differences: dict[str, Any], reason: str
) -> None:
    net = AutoModelForCausalLM.from_config(
        tiny_config(model_type, differences), dtype=torch.float32, attn_implementation=attention.NAME
    )
    with pytest.raises(InvalidRequest, match=reason):
        probe_layers(net.eval(), 3, 1024)


def test_static_rope_scaling_is_served(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
    make_tiny(tiny_config("llama", {"rope_parameters": yarn}), tmp_path)
    assert len(load_model(str(tmp_path), dtype="fp32", device="cpu").layers) == 3


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention mask of its own"),
    ],
)
def test_a_layer_that_asks_for_more_is_refused_while_it_runs(option: dict[str, Any], reason: str) -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    q = torch.zeros(1, 2, 3, 8)
    with (
        attention.attending(lambda layer, q, k, v, scale: q),
        pytest.raises(InvalidRequest, match=reason),
    ):
        attention.attention_function(module, q, q, q, **{"attention_mask": None} | option)


def test_options_without_effect_are_let_pass() -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    q = torch.ones(1, 2, 3, 8)
    with attention.attending(lambda layer, q, k, v, scale: q * scale):
        out, _ = attention.attention_function(
            module, q, q, q, None, scaling=0.5, softcap=None, sliding_window=48, output_attentions=False
        )
    assert out.shape == (1, 3, 2, 8)
    assert float(out.max()) == 0.5


def test_bad_devices_and_dtypes_are_named(tmp_path: Path) -> None:
    path = model_path("tiny-llama")
    with pytest.raises(
        InvalidRequest, match="dtype is 'int3'; allowed: auto, float32, fp32, bfloat16, bf16, float16, fp16"
    ):
        load_model(path, dtype="int3")
    with pytest.raises(InvalidRequest, match="device is 'gpu'; allowed: auto, cpu, cuda, cuda:N"):
        load_model(path, device="gpu")
    with pytest.raises(InvalidRequest, match="device is 'cuda:99'; this machine has"):
        load_model(path, device="cuda:99")
    with pytest.raises(NotFound, match="no model 'no/such/folder'; allowed: smollm2-135m"):
        load_model("no/such/folder")
    with pytest.raises(InvalidRequest, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_a_broken_folder_is_named(tmp_path: Path) -> None:
    make_tiny(tiny_config("llama", {}), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "none-such"}))
    with pytest.raises(InvalidRequest, match=r"config\.json cannot be loaded: The checkpoint .*none-such"):
        load_model(str(tmp_path), dtype="fp32")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidRequest, match="is not JSON"):
        load_model(str(tmp_path), dtype="fp32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(InvalidRequest, match=r"weights are missing in .* in all"):
        load_model(str(tmp_path), dtype="fp32")


def test_bf16_is_what_the_weights_are_run_in_by_a_cpu_that_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.model.load.loader.computes_bf16", lambda: True)
    model = load_model(model_path("tiny-llama"), dtype="bf16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.net.parameters()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(model.path).vocab_size == model.vocab_size

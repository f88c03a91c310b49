"""What each kind of rope scaling says about the context."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from models import model_path
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from isthmus.model.load.describe import describe_model
from isthmus.model.load.rope import context_length

K = 1024
YARN = {"rope_type": "yarn", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}

# what the config says beside max_position_embeddings, max_position_embeddings, context
CASES: list[tuple[str, dict[str, Any], int, int]] = [
    ("none", {}, 32 * K, 32 * K),
    ("null", {"rope_scaling": None}, 32 * K, 32 * K),
    ("default", {"rope_parameters": DEFAULT}, 32 * K, 32 * K),
    ("yarn", {"rope_scaling": YARN}, 32 * K, 128 * K),
    ("yarn, old key", {"rope_scaling": {"type": "yarn", "factor": 4}}, 32 * K, 128 * K),
    ("yarn, Qwen2.5", {"rope_scaling": {**YARN, "original_max_position_embeddings": 32 * K}}, 32 * K, 128 * K),
    ("yarn, Qwen3", {"rope_scaling": {**YARN, "original_max_position_embeddings": 32 * K}}, 40 * K, 128 * K),
    (
        "yarn, DeepSeek-V3",
        {"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4 * K}},
        160 * K,
        160 * K,
    ),
    (
        "yarn, gpt-oss",
        {"rope_parameters": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4 * K}},
        128 * K,
        128 * K,
    ),
    ("yarn, no factor", {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4 * K}}, 64 * K, 64 * K),
    ("linear", {"rope_scaling": {"type": "linear", "factor": 2.5}}, 4 * K, 10 * K),
    ("linear, Gemma 3", {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8}}, K, K),
    ("dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4 * K, 8 * K),
    (
        "llama3, Llama 3.2",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8 * K,
            }
        },
        128 * K,
        128 * K,
    ),
    (
        "longrope, Phi-3",
        {
            "original_max_position_embeddings": 4 * K,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        },
        128 * K,
        128 * K,
    ),
    ("proportional", {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, 8 * K, 16 * K),
    ("proportional, no factor", {"rope_parameters": {"rope_type": "proportional"}}, 8 * K, 8 * K),
    (
        "by layer type",  # layers with a window never look that far
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT}},
        32 * K,
        128 * K,
    ),
    (
        "by layer type, full ones not scaled",
        {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": YARN}},
        32 * K,
        32 * K,
    ),
    ("by other names", {"rope_parameters": {"main": YARN, "compress": DEFAULT}}, 32 * K, 32 * K),
    ("a factor below 1", {"rope_scaling": {"type": "linear", "factor": 0.5}}, 4 * K, 4 * K),
    ("a factor that is none", {"rope_scaling": {"type": "linear", "factor": float("nan")}}, 4 * K, 4 * K),
    ("no mapping", {"rope_scaling": "linear"}, 4 * K, 4 * K),
]


@pytest.mark.parametrize(
    ("config", "trained", "context"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_context(config: dict[str, Any], trained: int, context: int) -> None:
    assert context_length(config, trained) == context


def test_every_kind_of_transformers_has_a_case() -> None:
    kinds = {
        scaling.get("rope_type", scaling.get("type"))
        for _, config, _, _ in CASES
        if isinstance(scaling := config.get("rope_scaling") or config.get("rope_parameters"), dict)
    }
    assert kinds >= set(ROPE_INIT_FUNCTIONS)


def test_a_model_is_described_with_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_path("tiny-qwen2"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": 32_768, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    (folder / "config.json").write_text(json.dumps(config))
    assert describe_model(str(folder)).context_length == 131_072

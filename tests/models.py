"""Models for tests: small ones of many architectures with random weights, and the names of real ones.

The small ones are made once for each version of transformers, in a cache folder, as any Hugging Face folder is: config,
safetensors, tokenizer. Weights are fp32 and large enough that greedy outputs are no constant token.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from support.tiny_model import make_tiny, tiny_config

VERSION = 1  # of what this file makes: a new number makes them anew
WINDOW = 48
REAL_MODELS = ("smollm2-135m", "gemma3-270m")

# name -> (model type of transformers, what differs from _SMALL)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-llama": ("llama", {}),
    "tiny-mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "tiny-qwen2": ("qwen2", {}),
    "tiny-qwen3": ("qwen3", {"head_dim": 32}),
    "tiny-phi3": ("phi3", {}),
    "tiny-mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny-gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
TINY_MODELS = tuple(_CONFIGS)


def model_path(name: str) -> str:
    """What to give `load_model` for a name of TINY_MODELS or REAL_MODELS; a model's folder is made if need be."""
    if name in TINY_MODELS:
        return str(made(name, lambda folder: make_tiny(tiny_config(*_CONFIGS[name]), folder)))
    from isthmus.model.load.describe import describe_model

    return str(describe_model(name).path)


def made(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the tests' cache, made by `make` where it is not there; safe for many processes."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "isthmus" / "tests" / f"{name}-{VERSION}-{transformers.__version__}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                fresh = Path(temporary) / "model"
                fresh.mkdir()
                make(fresh)
                fresh.rename(folder)
    return folder

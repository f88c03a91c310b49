"""Models for tests: small ones of many architectures with random weights, and the names of real ones.

The small ones are made once for each version of transformers, in a cache folder, as any Hugging Face folder is: config,
safetensors, tokenizer. Weights are fp32 and large enough that greedy outputs are no constant token.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

VERSION = 1  # of what this file makes: a new number makes them anew
WINDOW = 48
REAL_MODELS = ("smollm2-135m", "gemma3-270m")

_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

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


def tiny_config(model_type: str, differences: dict[str, Any]) -> PretrainedConfig:
    """The config of a small model."""
    return AutoConfig.for_model(model_type, **_SMALL | differences)


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


def make_tiny(config: PretrainedConfig, folder: Path) -> None:
    """Random weights for a config, with a byte-level tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, weight in net.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.5)
            else:
                torch.nn.init.normal_(weight, mean=float(weight.detach().mean()), std=0.1)
    transformers.logging.disable_progress_bar()
    net.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0})
    )
    make_byte_tokenizer(folder)


def make_byte_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """A byte-level BPE tokenizer with no merges: <pad> <bos> <eos>, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)

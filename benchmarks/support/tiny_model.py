"""Small models with random weights and a byte-level tokenizer, as any Hugging Face folder: made in a moment, and their
greedy answers differ from prompt to prompt."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

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


def tiny_config(model_type: str, differences: dict[str, Any]) -> PretrainedConfig:
    """The config of a small model."""
    return AutoConfig.for_model(model_type, **_SMALL | differences)


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

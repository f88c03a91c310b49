"""Converts a GGUF file to a Hugging Face folder: `python -m isthmus.model.load.convert FILE.gguf FOLDER`.

transformers reads weights, config and tokenizer. What it leaves out of them is put right here. A process of its own
does this (`sources.py`), so that nobody who only wants the model's name has torch in memory.
"""

import functools
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers, processors

from ..lean_imports import AutoModelForCausalLM, PreTrainedModel, hf_logging

# Tokens that end a turn in a chat format. A GGUF file names one end token only, and it may be the other one.
_TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")

# Pre-tokenizers that split off each digit and then words as GPT-2 does; transformers takes them for GPT-2's own, which
# cuts "  4" elsewhere. The names are llama.cpp's.
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})

_MOST_IN_FP32 = 1_000_000_000  # parameters


def convert(file: Path, folder: Path) -> None:
    """Fills `folder` with config, safetensors and tokenizer of the model in `file`.

    Weights are kept in fp32, which holds what any quantized format stands for, and of large models in bf16.
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    # transformers reads the file's metadata three times, a string at a time, and makes the table of tensor names once
    # for each module: more than half of the time. Both are pure functions of their arguments.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)

    metadata: Any = gguf.GGUFReader(str(file)).fields
    tokenizer = _read_tokenizer(file, metadata)
    _say(f"{file.name}: tokenizer read, reading weights")
    net = _read_weights(file)
    ends = {token for token in _TURN_ENDS if token in tokenizer.get_vocab()}
    _note_ends(net, {tokenizer.convert_tokens_to_ids(token) for token in ends})
    _say(f"{file.name}: writing {sum(p.numel() for p in net.parameters()) / 1e6:.0f} M parameters")
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_tokenizer(file: Path, metadata: Any) -> Any:
    def said(key: str) -> Any:
        return metadata[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in metadata else None

    from transformers import AutoTokenizer  # after the lean imports

    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    backend = tokenizer.backend_tokenizer
    if said("pre") in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    bos = tokenizer.bos_token
    if said("add_bos_token") and bos and backend.encode("a").ids[:1] != [tokenizer.bos_token_id]:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


def _read_weights(file: Path) -> PreTrainedModel:
    """The model in a form that can be saved: transformers refuses that for what it read from GGUF."""
    dtype = torch.float32 if _parameters(file) <= _MOST_IN_FP32 else torch.bfloat16
    net = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, local_files_only=True)
    vars(net.config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(net.config, dtype=dtype)
    plain.load_state_dict(net.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = net.generation_config
    return plain


def _parameters(file: Path) -> int:
    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(str(file)).tensors)


def _note_ends(net: PreTrainedModel, ends: set[int]) -> None:
    """Notes what ends an output where `generate` and `describe.py` look for it."""
    generation: Any = net.generation_config
    named = generation.eos_token_id
    named = {named} if isinstance(named, int) else set(named or ())
    generation.eos_token_id = sorted(named | ends) or None
    generation._from_model_config = False  # else `generate` would take the one end token of the config again


def _say(line: str) -> None:
    print(f"[{time.process_time():5.1f} s] {line}", file=sys.stderr, flush=True)


def main() -> int:
    """The command; the reason for a failure goes to stdout in one line, for the process that started this one."""
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:
        print(str(error).strip().partition("\n")[0] or type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Converts a GGUF file to a Hugging Face folder: `python -m isthmus.model.convert FILE.gguf FOLDER`.

transformers reads the weights, the config and the tokenizer.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging


def convert(gguf: Path, folder: Path) -> None:
    """Fills `folder` with config, safetensors and tokenizer of the model in `gguf`."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    net = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # transformers refuses to save what it read from GGUF, as if it still were quantized: a plain model may be saved.
    vars(net.config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(net.config, dtype=torch.float32)
    plain.load_state_dict(net.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = net.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

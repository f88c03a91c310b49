"""What a model's folder may hold, checked before any library reads it.

Weights are safetensors: pickles (`.bin`, `.pt`, ...) run code of whoever wrote them when they are read. Code of a
model's own is never run. Nothing is read from outside the folder. Sizes are bounded.
"""

import shlex
from pathlib import Path
from typing import Any

from ...proto.errors import InvalidRequest
from .bounded import MAX_INDEX, MAX_JSON, MAX_TEMPLATE, MAX_TOKENIZER, read_json, size_of_file
from .reading import reading
from .safetensors_header import check_safetensors

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_MAX_ENTRIES = 10_000
# The largest files by name, then by the end of it: what is read of a folder at all.
_MOST = {"tokenizer.json": MAX_TOKENIZER, "vocab.json": MAX_TOKENIZER}
_MOST_BY_END = {".jinja": MAX_TEMPLATE, ".model": MAX_TOKENIZER, ".txt": MAX_TOKENIZER, ".json": MAX_JSON}
_INDEX_END = ".safetensors.index.json"
_CODE = "auto_map"
# Numbers of a config that memory or time is taken by before any weight is seen.
_MOST_IN_CONFIG = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4096),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 1 << 20),
    **dict.fromkeys(("intermediate_size", "n_inner", "moe_intermediate_size"), 1 << 22),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"), 1 << 14),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 1 << 14),
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 28,
    "n_positions": 1 << 28,
}


def check_folder(folder: Path) -> None:
    """InvalidRequest, with the reason and what to do, for a folder that is not to be served."""
    entries = _entries(folder)
    names = {path.name for path in entries}
    if "adapter_config.json" in names:
        raise InvalidRequest(f"{folder} is an adapter; allowed: whole models (merge it into its model, and save that)")
    for path in entries:
        with reading(path):
            _check_file(path)
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    pickles = sorted(path.name for path in entries if path.suffix in PICKLES)
    if pickles and not weights:
        raise refused_pickle(folder / pickles[0])
    for name in ("config.json", "tokenizer_config.json"):
        with reading(folder / name):
            _check_config(folder / name)
    for name in weights:
        with reading(folder / name):
            check_safetensors(folder / name)


def refused_pickle(file: Path) -> InvalidRequest:
    """The error for weights that are a pickle, with the command that converts them."""
    folder = file.parent
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; a, b = sys.argv[1:]; "
        "M.from_pretrained(a, dtype='auto').save_pretrained(b); T.from_pretrained(a).save_pretrained(b)"
    )
    command = ["python", "-c", code, str(folder), f"{folder}-safetensors"]
    return InvalidRequest(
        f"{file} is a pickle, which runs code of whoever wrote it when it is read; allowed: safetensors. If you trust "
        f"it, convert it where it can do no harm: {shlex.join(command)}"
    )


def _entries(folder: Path) -> list[Path]:
    """The files that may be read; InvalidRequest for a link that leads out of the folder."""
    root = _root(folder)
    found = []
    for number, path in enumerate((*folder.iterdir(), *(folder / "additional_chat_templates").glob("*"))):
        if number >= _MAX_ENTRIES:
            raise InvalidRequest(f"{folder} has more than {_MAX_ENTRIES} files")
        if not path.resolve().is_relative_to(root):
            raise InvalidRequest(f"{path} is a link to {path.resolve()}, which is not in the model's folder")
        if not path.exists():
            raise InvalidRequest(f"{path} is a link to nothing")
        if not path.is_dir() and not path.name.startswith("."):
            found.append(path)
    return found


def _root(folder: Path) -> Path:
    """What links may lead into: in the hub's cache a snapshot's files are links into `blobs` beside it."""
    folder = folder.resolve()
    of_hub = folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()
    return folder.parent.parent if of_hub else folder


def _check_file(path: Path) -> None:
    if path.name.endswith(_INDEX_END):
        _check_index(path)
    elif most := _MOST.get(path.name, _MOST_BY_END.get(path.suffix)):
        size_of_file(path, most)
        if most == MAX_JSON:
            read_json(path)


def _check_index(path: Path) -> None:
    index = read_json(path, MAX_INDEX)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise InvalidRequest(f"{path} has no weight_map of file names")
    for name in sorted(set(weights.values())):
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise InvalidRequest(f"{path} names {name[:200]!r}; allowed: safetensors files beside it")
        if not (path.parent / name).is_file():
            raise InvalidRequest(f"{path} names {name[:200]!r}, which is not there")


def _check_config(path: Path) -> None:
    if not path.exists():
        return
    pending = [read_json(path)]
    if not isinstance(pending[0], dict):
        raise InvalidRequest(f"{path} is not a JSON object")
    while pending:
        config = pending.pop()
        if config.get(_CODE):
            raise InvalidRequest(
                f"{path} names code of the model's own ({_CODE}: {_shown(config[_CODE])}), which is never run; "
                f"allowed: models that transformers knows (where it does, take {_CODE} out of a copy of the folder)"
            )
        for name, most in _MOST_IN_CONFIG.items():
            if isinstance(value := config.get(name), int | float) and not 0 <= value <= most:
                raise InvalidRequest(f"{name} is {_number(value)} in {path}; allowed: at most {most}")
        pending += [value for value in config.values() if isinstance(value, dict)]


def _number(value: float) -> str:
    """An integer may be more than a float holds."""
    return f"{value:.6g}" if abs(value) < 1e300 else str(value)[:40]


def _shown(value: Any) -> str:
    return str(value)[:200]

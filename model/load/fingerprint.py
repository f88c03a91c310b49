"""A model's fingerprint: two workers with the same one compute with the same weights.

It is of content alone: the same on every machine, whatever the path and whatever the dtype the weights are run in. It
covers every byte of the weights; they are read for it once (`digests.py`).
"""

import json
from pathlib import Path
from typing import Any

import xxhash

from ...proto.errors import InvalidRequest
from .digests import content_digest

# What transformers notes in a config beside the model itself.
_NOT_THE_MODEL = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"})


def model_fingerprint(folder: Path) -> str:
    """32 hex digits over config.json and the safetensors files of a Hugging Face folder.

    InvalidRequest where the folder has no safetensors files.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InvalidRequest(f"no safetensors files in {folder}")
    digest = xxhash.xxh3_128()
    config = json.loads((folder / "config.json").read_bytes())
    digest.update(json.dumps(_canonical(config), sort_keys=True).encode())
    for path in weights:
        digest.update(path.name.encode())
        digest.update(content_digest(path).encode())
    return digest.hexdigest()


def _canonical(value: Any) -> Any:
    """The config without notes and without nulls, which say the same as an absent key."""
    if isinstance(value, dict):
        items = ((key, _canonical(item)) for key, item in value.items() if key not in _NOT_THE_MODEL)
        return {key: item for key, item in items if item is not None}
    return value

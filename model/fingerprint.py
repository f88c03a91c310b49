"""A model's fingerprint: two workers with the same one compute with the same weights.

It is of content alone: the same on every machine, whatever the path and whatever the dtype the weights are run in.
Of large files it reads a fixed number of blocks, so that it takes milliseconds for any model.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from ..proto.errors import InvalidRequest

_BLOCK = 64 * 1024
_BLOCKS = 64

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
        for block in _samples(path, _header_bytes(path)):
            digest.update(block)
    return digest.hexdigest()


def file_key(path: Path) -> str:
    """16 hex digits over size and sampled content of one file."""
    digest = xxhash.xxh3_64()
    for block in _samples(path, 1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _canonical(value: Any) -> Any:
    """The config without notes and without nulls, which say the same as an absent key."""
    if isinstance(value, dict):
        items = ((key, _canonical(item)) for key, item in value.items() if key not in _NOT_THE_MODEL)
        return {key: item for key, item in items if item is not None}
    return value


def _header_bytes(path: Path) -> int:
    """Length of a safetensors file's header: eight bytes of length, and names, shapes and offsets as JSON."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _samples(path: Path, head: int) -> Iterator[bytes]:
    """The size, the first `head` bytes, and blocks spread evenly over the rest; all of it where it is small."""
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    with path.open("rb") as file:
        yield file.read(min(head, size))
        rest = max(0, size - head)
        if rest <= _BLOCK * _BLOCKS:
            yield file.read()
        else:
            yield from _spread(file, head, rest)


def _spread(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    for number in range(_BLOCKS):
        file.seek(start + (length - _BLOCK) * number // (_BLOCKS - 1))
        yield file.read(_BLOCK)

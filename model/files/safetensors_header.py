"""The header of a safetensors file, checked before a library reads it.

    length of the header (8, little-endian) | header (JSON) | tensors, one after the other, without gaps

Format: https://huggingface.co/docs/safetensors
"""

from pathlib import Path
from typing import Any

from ...proto.errors import InvalidRequest
from .bounded import parse_json, size_of_file

MAX_HEADER = 16 << 20  # bytes; some 100,000 tensors
MAX_FILE = 1 << 50
MAX_NAME, MAX_DIMENSIONS = 1024, 8
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


def check_safetensors(path: Path) -> int:
    """How many tensors a file has; InvalidRequest where its header says what the file cannot hold."""
    size = size_of_file(path, MAX_FILE)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise InvalidRequest(f"{path}: a header of {length} bytes; allowed: at most {min(MAX_HEADER, size)}")
        header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict):
        raise InvalidRequest(f"the header of {path} is not an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InvalidRequest(f"the metadata of {path} is not of texts")
    end = 0
    for begin, after, name in sorted(_extent(path, name, tensor) for name, tensor in header.items()):
        if begin != end:
            raise InvalidRequest(f"{path}: tensor {name!r} begins at {begin}, the one before ends at {end}")
        end = after
    if end != size - 8 - length:
        raise InvalidRequest(f"{path}: {size - 8 - length} bytes of tensors, and the header tells of {end}")
    return len(header)


def _extent(path: Path, name: str, tensor: Any) -> tuple[int, int, str]:
    """Where a tensor begins and ends, and its name."""
    if len(name) > MAX_NAME:
        raise InvalidRequest(f"{path}: a tensor's name of {len(name)} characters; allowed: at most {MAX_NAME}")
    try:
        bits, shape = _BITS[tensor["dtype"]], tensor["shape"]
        begin, end = tensor["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise InvalidRequest(f"{path}: tensor {name!r} has no known dtype, shape and data_offsets") from None
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, (*shape, begin, end))):
        raise InvalidRequest(f"{path}: tensor {name!r} has a shape or data_offsets that cannot be")
    for count in shape:
        bits *= count
    if bits != 8 * (end - begin):
        raise InvalidRequest(f"{path}: tensor {name!r} of shape {shape} has {end - begin} bytes, which is not its size")
    return begin, end, name


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_FILE

"""JSON of a model's folder, read with bounds: a file is small enough before it is parsed, and not nested too deep."""

import json
import stat
from pathlib import Path
from typing import Any

from ...proto.errors import InvalidRequest

MAX_JSON = 8 << 20  # bytes of config.json and its like
MAX_TOKENIZER = 128 << 20  # of tokenizer.json and of vocabularies
MAX_INDEX = 64 << 20  # of the index of safetensors files
MAX_TEMPLATE = 256 << 10  # of a chat template in a file of its own; a template's characters are bounded too
MAX_NESTING = 64


def size_of_file(path: Path, most: int) -> int:
    """Its bytes; InvalidRequest where it is no ordinary file, or has more than `most`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InvalidRequest(f"{path} is no ordinary file")
    if status.st_size > most:
        raise InvalidRequest(f"{path} has {status.st_size} bytes; allowed: at most {most}")
    return status.st_size


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """What a JSON file holds. InvalidRequest where it is not JSON, too large or nested too deep; OSError as `open`."""
    size_of_file(path, most)
    with path.open("rb") as file:
        return parse_json(file.read(most), str(path))


def read_chat_template(path: Path) -> str:
    """A chat template in a file of its own; InvalidRequest where it cannot be read as one."""
    try:
        size_of_file(path, MAX_TEMPLATE)
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InvalidRequest(f"the chat template {path} cannot be read: {reason}") from None


def parse_json(text: bytes, name: str) -> Any:
    """What a JSON text holds, errors as `read_json`."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise InvalidRequest(f"{name} is nested too deep; allowed: {MAX_NESTING}") from None
    except ValueError as error:
        raise InvalidRequest(f"{name} is not JSON: {str(error)[:200]}") from None
    level = [value]
    for _ in range(MAX_NESTING):
        level = [part for item in level for part in _parts(item)]
        if not level:
            return value
    raise InvalidRequest(f"{name} is nested too deep; allowed: {MAX_NESTING}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may take another of two values of one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def _parts(item: Any) -> Any:
    if isinstance(item, dict):
        return [value for value in item.values() if isinstance(value, dict | list)]
    return [value for value in item if isinstance(value, dict | list)] if isinstance(item, list) else ()

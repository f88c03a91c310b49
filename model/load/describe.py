"""What is known of a model without running it. No torch: the gateway asks this."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...proto.errors import InvalidRequest
from ..cache import Note
from ..files.bounded import MAX_TOKENIZER, read_json
from ..files.reading import reading
from .fingerprint import model_fingerprint
from .rope import context_length
from .sources import locate


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A model that is here, described by its files."""

    name: str
    fingerprint: str  # 32 hex digits, see fingerprint.py
    architecture: str  # the class of transformers that runs it
    context_length: int  # tokens, prompt and output together
    vocab_size: int
    eos_token_ids: frozenset[int]
    path: Path  # of its Hugging Face folder


MAX_CONTEXT = 1 << 28  # tokens; whoever probes a model makes a mask of so many
MAX_TOKEN_ID = 1 << 31


def describe_model(source: str, manifest: str | None = None) -> ModelDescription:
    """The description of a source (`sources.py`), which is fetched or converted once if need be; errors as there."""
    located = locate(source, manifest)
    config = _read(located.folder / "config.json")
    fingerprint = model_fingerprint(located.folder)
    with reading(located.folder / "config.json"):
        text = config.get("text_config") or config
        context = context_length(text, _size(text, "max_position_embeddings", located.folder))
        vocabulary = _size(text, "vocab_size", located.folder)
        architecture = _architecture(config, located.folder)
    if context > MAX_CONTEXT:
        raise InvalidRequest(f"a context of {context} tokens in {located.name}; allowed: at most {MAX_CONTEXT}")
    return ModelDescription(
        name=located.name,
        fingerprint=fingerprint,
        architecture=architecture,
        context_length=context,
        vocab_size=vocabulary,
        eos_token_ids=eos_token_ids(located.folder),
        path=located.folder,
    )


def eos_token_ids(folder: Path) -> frozenset[int]:
    """The tokens that end an output: those at which transformers' `generate` stops, and the tokenizer's own."""
    for path, named in _generation_settings(folder):
        if (ids := named.get("eos_token_id")) is None:
            continue
        listed = ids if isinstance(ids, list) else [ids]
        if not all(type(token) is int and abs(token) < MAX_TOKEN_ID for token in listed):
            raise InvalidRequest(f"eos_token_id is {str(ids)[:100]} in {path}; allowed: the id of a token, or a list")
        return frozenset(listed) | _tokenizer_end(folder)
    return _tokenizer_end(folder)


def _generation_settings(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Where the end of an output may stand, and what stands there."""
    path = folder / "generation_config.json"
    yield path, _read(path)
    path = folder / "config.json"
    config = _read(path)
    yield path, config
    text = config.get("text_config")
    if isinstance(text, dict):
        yield path, text


def _tokenizer_end(folder: Path) -> frozenset[int]:
    """Its end token is the end of a turn in many chat models whose config names the end of a text only."""
    if Note.read(folder):  # converted here: generation_config.json has it
        return frozenset()
    end = _read(folder / "tokenizer_config.json").get("eos_token")
    text = end.get("content") if isinstance(end, dict) else end
    with reading(folder / "tokenizer.json"):
        added = _read(folder / "tokenizer.json").get("added_tokens") or []
        return frozenset(int(token["id"]) for token in added if token["content"] == text)


def _architecture(config: dict[str, Any], folder: Path) -> str:
    named = next(iter(config.get("architectures") or [config.get("model_type", "unknown")]))
    if not isinstance(named, str):
        raise InvalidRequest(f"architectures is {str(named)[:100]} in {folder / 'config.json'}; allowed: names")
    return named


def _size(config: dict[str, Any], key: str, folder: Path) -> int:
    """A number of the config. transformers leaves values out that are a class's default: then it is asked."""
    if key not in config:
        from transformers import AutoConfig

        full = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_text_config(
            decoder=True
        )
        config = {key: getattr(full, key, None)}
    value = config[key]
    if not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{key} is {str(value)[:40]} in {folder / 'config.json'}; allowed: 1 or more")
    return value


def _read(path: Path) -> dict[str, Any]:
    with reading(path):
        try:
            found = read_json(path, MAX_TOKENIZER)
        except FileNotFoundError:
            return {}
    if not isinstance(found, dict):
        raise InvalidRequest(f"{path} is not a JSON object")
    return found

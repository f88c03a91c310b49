"""Where a model comes from: the sources that `load_model` and `describe_model` take, each made a Hugging Face folder.

    smollm2-135m, gemma3-270m     carried by an installed Python package, as GGUF
    PATH                          a folder with config.json, safetensors files and tokenizer
    FILE.gguf                     converted once
    the name of a converted file  from the cache
    OWNER/NAME                    from the Hugging Face hub

Torch is not imported here: a conversion runs in a process of its own.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ...proto.errors import InvalidRequest, NotFound, Unavailable
from ..cache import Note, cache_root, cached_models, cached_or_made
from . import packages
from .digests import content_digest

CONVERTER = "2"  # of `convert.py`; a new number makes old folders of the cache unused
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Located:
    """A model that is here."""

    name: str
    folder: Path  # config.json, safetensors files, tokenizer


def locate(source: str) -> Located:
    """The folder of a source, fetched or converted if need be.

    NotFound where there is no such model, Unavailable where the hub cannot be reached, InvalidRequest for a folder or
    file that is no model.
    """
    if not source:
        raise InvalidRequest("no model named; allowed: " + _allowed())
    if source in packages.PACKAGED:
        return _from_gguf(packages.gguf_of(source), source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _from_gguf(path, _name_of(path))
    for note, folder in cached_models():
        if note.name == source and note.converter == CONVERTER:
            return Located(source, folder)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and not source.endswith(".gguf"):
        return _from_hub(source)
    raise NotFound(f"no model {source!r}; allowed: {_allowed()}")


def _allowed() -> str:
    return f"{', '.join(packages.PACKAGED)}, a model folder, a .gguf file, or OWNER/NAME of the Hugging Face hub"


def _folder(path: Path) -> Located:
    if not (path / "config.json").is_file():
        raise InvalidRequest(f"{path} has no config.json: not the folder of a Hugging Face model")
    note = Note.read(path)
    return Located(note.name if note else path.resolve().name, path.resolve())


def _name_of(gguf: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", gguf.stem).strip("-.").lower() or "model"


def _from_gguf(gguf: Path, name: str) -> Located:
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InvalidRequest(f"{gguf} is not a GGUF file")
    note = Note(name=name, source=gguf.name, converter=CONVERTER)
    folder = cache_root() / f"{name}-{content_digest(gguf)[:16]}-{CONVERTER}"
    return Located(name, cached_or_made(folder, note, lambda fresh: _convert(gguf, fresh)))


def _convert(gguf: Path, folder: Path) -> None:
    print(f"converting {gguf.name} (once)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "isthmus.model.load.convert", str(gguf.resolve()), str(folder)]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=quiet, text=True, check=False)
    if done.returncode:
        reason = done.stdout.strip().rpartition("\n")[2] or f"the converter ended with {done.returncode}"
        raise InvalidRequest(f"{gguf} cannot be converted: {reason}")


def _from_hub(repo: str) -> Located:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import HfHubHTTPError

    try:
        folder = snapshot_download(repo, allow_patterns=list(_HUB_FILES), etag_timeout=5)
    except RepositoryNotFoundError:
        raise NotFound(f"the Hugging Face hub has no model {repo!r} (or it is gated: set HF_TOKEN)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Unavailable(f"{repo!r} is not here, and the Hugging Face hub cannot be reached: {reason}") from error
    return Located(repo, _folder(Path(folder)).folder)

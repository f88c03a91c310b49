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
from ..files.folder import PICKLES, check_folder, refused_pickle
from ..files.gguf_header import check_gguf
from ..files.manifest import tell_on_stderr, verify_model
from . import packages
from .digests import content_digest

CONVERTER = "2"  # of `convert.py`; a new number makes old folders of the cache unused
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Located:
    """A model that is here."""

    name: str
    folder: Path  # config.json, safetensors files, tokenizer


@dataclass(frozen=True)
class Origin:
    """What a source stands for: a folder, or a GGUF file that a folder is made of."""

    name: str
    path: Path

    def check(self, manifest: str | None) -> None:
        """InvalidRequest where it is not what a manifest (the path of it) says; nothing is loaded before."""
        if manifest is not None:
            verify_model(self.path, Path(manifest).expanduser(), tell_on_stderr)


def locate(source: str, manifest: str | None = None) -> Located:
    """The folder of a source, fetched or converted if need be, once it is what a manifest says, if one is given.

    NotFound where there is no such model, Unavailable where the hub cannot be reached, InvalidRequest for a folder or
    file that is no model, or is not to be served (`model/files`).
    """
    origin = find(source)
    origin.check(manifest)
    if origin.path.is_file():
        return _from_gguf(origin.path, origin.name)
    return _checked(origin)


def find(source: str) -> Origin:
    """Where the files of a source are, fetched if need be; errors as `locate`."""
    if not source:
        raise InvalidRequest("no model named; allowed: " + _allowed())
    if source in packages.PACKAGED:
        return Origin(source, packages.gguf_of(source))
    path = Path(source).expanduser()
    if path.is_dir():
        note = Note.read(path)
        return Origin(note.name if note else path.resolve().name, path.resolve())
    if path.suffix in PICKLES and path.exists():
        raise refused_pickle(path)
    if path.is_file():
        return Origin(_name_of(path), path)
    for note, folder in cached_models():
        if note.name == source and note.converter == CONVERTER:
            return Origin(source, folder)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and not source.endswith(".gguf"):
        return Origin(source, _from_hub(source))
    raise NotFound(f"no model {source!r}; allowed: {_allowed()}")


def _allowed() -> str:
    return f"{', '.join(packages.PACKAGED)}, a model folder, a .gguf file, or OWNER/NAME of the Hugging Face hub"


def _checked(origin: Origin) -> Located:
    if not (origin.path / "config.json").is_file():
        raise InvalidRequest(f"{origin.path} has no config.json: not the folder of a Hugging Face model")
    check_folder(origin.path)
    return Located(origin.name, origin.path)


def _name_of(gguf: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", gguf.stem).strip("-.").lower() or "model"


def _from_gguf(gguf: Path, name: str) -> Located:
    if not _begins_as_gguf(gguf):
        raise InvalidRequest(f"{gguf} is not a GGUF file")
    note = Note(name=name, source=gguf.name, converter=CONVERTER)
    folder = cache_root() / f"{name}-{content_digest(gguf)[:16]}-{CONVERTER}"
    return Located(name, cached_or_made(folder, note, lambda fresh: _convert(gguf, fresh)))


def _begins_as_gguf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def _convert(gguf: Path, folder: Path) -> None:
    check_gguf(gguf)
    print(f"converting {gguf.name} (once)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "isthmus.model.load.convert", str(gguf.resolve()), str(folder)]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=quiet, text=True, check=False)
    if done.returncode:
        reason = done.stdout.strip().rpartition("\n")[2] or f"the converter ended with {done.returncode}"
        raise InvalidRequest(f"{gguf} cannot be converted: {reason}")


def _from_hub(repo: str) -> Path:
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
    return Path(folder).resolve()

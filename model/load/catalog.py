"""What can be run on this machine without a hub, and what a package would bring. No torch, no network."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..cache import cached_models
from .packages import PACKAGED, is_installed
from .sources import CONVERTER


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model that may be named as a source."""

    name: str
    about: str
    here: bool
    path: Path | None = None  # of its folder, where it is ready to load
    install: str | None = None  # the command that brings it, where it is not here


def catalog() -> tuple[Entry, ...]:
    """Packaged models (installed or not), then files converted before, then models downloaded from the hub."""
    converted = {note.name: path for note, path in cached_models() if note.converter == CONVERTER}
    return (*_packaged(converted), *_converted(converted), *_downloaded())


def _packaged(converted: dict[str, Path]) -> Iterator[Entry]:
    for name, model in PACKAGED.items():
        here = is_installed(name)
        yield Entry(
            name=name,
            about=model.about,
            here=here,
            path=converted.get(name) if here else None,
            install=None if here else f"pip install {model.install}",
        )


def _converted(converted: dict[str, Path]) -> Iterator[Entry]:
    for name, path in converted.items():
        if name not in PACKAGED:
            yield Entry(name=name, about="converted from GGUF", here=True, path=path)


def _downloaded() -> Iterator[Entry]:
    """Models of the hub's own cache that are complete enough to load."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for repo in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        for snapshot in sorted(repo.glob("snapshots/*")):
            if (snapshot / "config.json").exists() and any(snapshot.glob("*.safetensors")):
                name = repo.name.removeprefix("models--").replace("--", "/", 1)
                yield Entry(name=name, about="downloaded from the hub", here=True, path=snapshot)
                break

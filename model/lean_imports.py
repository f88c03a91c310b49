"""transformers, imported without what serving never uses: half of the seconds that a worker starts in were imports.

transformers marks functions for the compiler of PyTorch (Dynamo) and brings its own continuous batching and tensor
parallelism, and so imports Dynamo with sympy, `torch.distributed.tensor` and FSDP. Nothing here is compiled by Dynamo
or spread over processes. While transformers is imported, placeholders stand for those: a mark returns the function as
it is. Afterwards they are gone, and whoever imports the real ones gets them.

Everything of transformers that runs a model comes from here.
"""

import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_DYNAMO = "torch._dynamo"
_BATCHING = "transformers.generation.continuous_batching"
_lock = threading.RLock()


def _mark(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stands for a decorator of the compiler, with arguments or without."""
    return function if callable(function) else _mark


class _Unused(ModuleType):
    """A module of which transformers only takes names when it is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _mark if self.__name__ == _DYNAMO else type(name, (), {})


class _Finder(MetaPathFinder, Loader):
    """Dynamo itself is a placeholder, its parts are real; of continuous batching the parts are placeholders too."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None):
        if fullname == _DYNAMO:
            real = PathFinder.find_spec(fullname, torch.__path__)
            spec = ModuleSpec(fullname, self, is_package=True)
            spec.submodule_search_locations = None if real is None else real.submodule_search_locations
            return spec
        if fullname == _BATCHING or fullname.startswith(f"{_BATCHING}."):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Unused(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


@contextmanager
def lean() -> Iterator[None]:
    """Placeholders for what nobody has imported yet."""
    with _lock:
        if _DYNAMO in sys.modules:
            yield
            return
        finder, distributed = _Finder(), torch.distributed.is_available
        sys.meta_path.insert(0, finder)
        torch.distributed.is_available = lambda: False
        try:
            yield
        finally:
            torch.distributed.is_available = distributed
            sys.meta_path.remove(finder)
            for name in [name for name, module in sys.modules.items() if isinstance(module, _Unused)]:
                parent = sys.modules.get(name.rpartition(".")[0])
                if parent is not None and name.rpartition(".")[2] in vars(parent):
                    delattr(parent, name.rpartition(".")[2])
                del sys.modules[name]


with lean():
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoConfig,
        AutoModelForCausalLM,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.utils import logging as hf_logging

    for _name in ("generation.utils", "modeling_layers", "masking_utils", "quantizers.auto"):
        importlib.import_module(f"transformers.{_name}")  # what every model's own module imports
    # What PyTorch asks for where weights get their shapes before their memory; here it is shared by forked processes.
    importlib.import_module("torch.fx.experimental.symbolic_shapes")

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "AutoConfig",
    "AutoModelForCausalLM",
    "PreTrainedModel",
    "PretrainedConfig",
    "hf_logging",
    "lean",
]

"""What a model takes of a machine's memory, and whether all that a worker takes fits.

Budgets are known before anything is allocated; on a CPU the system commits memory only as it is first written, and
the budgets are what it can come to.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..kernels.shapes import LayerShape
from ..proto.errors import InvalidRequest
from .model import Model

GIB = 1 << 30
PROCESS_BYTES = 512 << 20  # of a process with its libraries and no model
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What memory goes by. Bytes of weights are those of the loaded model, packed copies included."""

    layers: Sequence[LayerShape]
    dtype: torch.dtype  # of activations and KV
    device: torch.device
    context_length: int
    vocab_size: int
    hidden: int
    intermediate: int
    weight_bytes: int

    def activation_bytes(self, tokens: int, rows: int) -> int:
        """About what a step of that many tokens takes, with logits of so many rows: the widest layer and sampling.

        The residual, its norm, queries, keys, values and the output of attention; gate, up and their product. Logits
        are there in the model's dtype, in fp32, and twice more while they are sampled.
        """
        wide = 8 * self.hidden + 3 * self.intermediate
        return tokens * wide * self.dtype.itemsize + rows * self.vocab_size * (self.dtype.itemsize + 12)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One budget."""

    name: str
    nbytes: int
    lower: str = ""  # the settings that make it smaller
    on_device: bool = True  # False: in host memory, which on a CPU is the same


def size_of(model: Model) -> ModelSize:
    """Of a loaded model."""
    return make_size(
        model.net.config.get_text_config(decoder=True),
        layers=model.layers,
        dtype=model.dtype,
        device=model.device,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        weight_bytes=weight_bytes(model.net),
    )


def make_size(
    config: object,
    *,
    layers: Sequence[LayerShape],
    dtype: torch.dtype,
    device: torch.device,
    context_length: int,
    vocab_size: int,
    weight_bytes: int,
) -> ModelSize:
    """With the widths that a config of transformers says."""
    hidden = int(getattr(config, "hidden_size", 0))
    return ModelSize(
        layers=layers,
        dtype=dtype,
        device=device,
        context_length=context_length,
        vocab_size=vocab_size,
        hidden=hidden,
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        weight_bytes=weight_bytes,
    )


def weight_bytes(net: nn.Module) -> int:
    """Of all tensors that its modules hold, each once."""
    found: dict[int, int] = {}
    for module in net.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
        for tensor in own:
            if isinstance(tensor, Tensor):
                found[id(tensor)] = tensor.numel() * tensor.element_size()
            elif not isinstance(tensor, nn.Module) and isinstance(getattr(tensor, "nbytes", None), int):
                found[id(tensor)] = tensor.nbytes  # panels of numpy
    return sum(found.values())


def machine_bytes() -> int:
    """Memory that this process may use: the machine's, or what its container is given."""
    limits = [int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")]
    for path in _CGROUP:
        limits += [int(line) for line in _lines(path) if line.strip().isdigit()]
    return min(limits, default=1 << 62)


def device_bytes(device: torch.device) -> int:
    """Memory of the device; on a CPU the machine's."""
    if device.type == "cpu":
        return machine_bytes()
    return torch.cuda.get_device_properties(device).total_memory


def require_memory(budgets: Sequence[Budget], device: torch.device) -> None:
    """InvalidRequest, with what to lower, where these budgets come to more than the memory there is."""
    if problem := excess(budgets, device):
        raise InvalidRequest(problem)


def excess(budgets: Sequence[Budget], device: torch.device) -> str:
    """Why these budgets do not fit, and what to lower; "" where they do."""
    if device.type == "cpu":
        return _excess(budgets, "this machine", machine_bytes())
    on_device, on_host = (
        _excess([budget for budget in budgets if budget.on_device is wanted], name, room)
        for wanted, name, room in ((True, str(device), device_bytes(device)), (False, "this machine", machine_bytes()))
    )
    return on_device or on_host


def refuse_oversized(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """InvalidRequest where the weights in a folder alone are more than the device holds: known before they are read.

    Files may hold them in a wider dtype than the one that they are loaded in, twice as wide at most; a folder may have
    them twice, under other names (`consolidated.safetensors`): what transformers reads is counted.
    """
    index = folder / "model.safetensors.index.json"
    files = {file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated")}
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):  # who loads it says so
        files &= {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    weights = sum(file.stat().st_size for file in files)
    narrowed = weights if dtype == torch.float32 else weights // 2
    require_memory([Budget(name="weights", nbytes=narrowed)], device)


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB"


def _excess(budgets: Sequence[Budget], where: str, room: int) -> str:
    total = sum(budget.nbytes for budget in budgets)
    if total <= room:
        return ""
    largest = sorted(budgets, key=lambda budget: budget.nbytes, reverse=True)
    parts = ", ".join(f"{budget.name} {gib(budget.nbytes)}" for budget in largest)
    settings = dict.fromkeys(budget.lower for budget in largest if budget.lower)
    what = f": lower {' or '.join(settings)}" if settings else ": take a smaller model or a larger machine"
    return f"this worker takes up to {gib(total)}, and {where} has {gib(room)} ({parts}){what}"


def _lines(path: str) -> Iterable[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()

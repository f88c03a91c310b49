"""What workers take of memory: the table of `isthmus worker ... --dry-run`, and the lines of `isthmus status -v`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...decode.config import DecodeConfig
from ...prefill.config import PrefillConfig
from ..config import CONFIG_OF, Role

if TYPE_CHECKING:
    from ...model.memory import Budget, ModelSize
    from ...proto.worker_pb2 import ClusterStatus, MemoryUse


def show_plan(role: Role, settings: Mapping[str, Any]) -> None:
    """Prints what a worker with these settings would take, with no weights read.

    InvalidRequest, with what to lower, where that is more than there is.
    """
    from ...model.load.blueprint import blueprint
    from ...model.memory import device_bytes, machine_bytes, require_memory

    config = CONFIG_OF[role](**settings)
    size = blueprint(config.model, dtype=config.dtype, device=config.device)
    budgets = _budgets(config, size)
    for line in _plan_lines(budgets):
        print(line)
    if size.device.type != "cpu":
        print(_row(str(size.device), device_bytes(size.device), "there is"))
    print(_row("this machine", machine_bytes(), "there is"))
    require_memory(budgets, size.device)


def memory_lines(cluster: "ClusterStatus") -> list[str]:
    """For each worker, and the gateway, what is used of which budget."""
    owners = [*((worker.worker_id, worker.memory) for worker in cluster.workers), ("gateway", cluster.memory)]
    return [line for name, uses in owners if uses for line in (f"{name}:", *map(_use_line, uses))]


def _budgets(config: PrefillConfig | DecodeConfig, size: "ModelSize") -> "Sequence[Budget]":
    if isinstance(config, PrefillConfig):
        from ...prefill.memory import plan_memory

        return plan_memory(config, size).budgets
    from ...decode.memory import plan_memory

    return plan_memory(config, size).budgets


def _plan_lines(budgets: "Sequence[Budget]") -> list[str]:
    lines, total = [], 0
    for budget in budgets:
        total += budget.nbytes
        lines.append(_row(budget.name, budget.nbytes, budget.lower))
    return [*lines, _row("in all", total, "")]


def _row(name: str, count: int, note: str) -> str:
    from ...model.memory import gib

    return f"{name:14}{gib(count):>12}   {note}".rstrip()


def _use_line(use: "MemoryUse") -> str:
    return f"  {use.name:14}{use.used_bytes / (1 << 20):>10.1f} of {use.budget_bytes / (1 << 20):,.0f} MiB"

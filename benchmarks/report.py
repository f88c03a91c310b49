"""What every benchmark prints and writes: conditions, percentiles, JSON."""

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99, rounded to hundredths."""
    return {name: round(float(np.percentile(values, rank)), 2) for name, rank in (("p50", 50), ("p99", 99))}


def conditions(**own: Any) -> dict[str, Any]:
    """When and on what a benchmark ran."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        **own,
    }


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Writes the result where a path was given."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line for line in lines if line.startswith("flags")), "")
    native = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    return f"{name} ({', '.join(native)})"

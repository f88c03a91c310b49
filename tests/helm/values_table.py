"""The table of values in the chart's README, from the comments in values.yaml: run this file to write it anew."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "helm"
BEGIN, END = "<!-- values -->", "<!-- end of values -->"
_KEY = re.compile(r"^( *)([\w.-]+):(.*)$")


@dataclass(frozen=True)
class Value:
    """A key of values.yaml: its path, and the comment above it, "" where there is none."""

    path: tuple[str, ...]
    comment: str


def values() -> Iterator[Value]:
    """All keys in their order. A key without a comment is part of the value above it."""
    path: list[str] = []
    comment: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment.append(text.removeprefix("#").strip())
        elif found := _KEY.match(line):
            path[len(found[1]) // 2 :] = [found[2]]
            yield Value(tuple(path), " ".join(comment))
            comment = []
        else:
            comment = []


def table() -> str:
    """The rows, each a line: key, default, meaning. Sections have no default."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    commented = [value for value in values() if value.comment]
    sections = {value.path[:-1] for value in commented}
    rows = ["| key | default | |", "|---|---|---|"]
    for value in commented:
        default = "" if value.path in sections else f"`{json.dumps(_at(defaults, value.path))}`"
        rows.append(f"| `{'.'.join(value.path)}` | {default} | {value.comment.replace('|', '/')} |")
    return "\n".join(rows)


def with_table(readme: str) -> str:
    """The README with the table between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


if __name__ == "__main__":
    file = CHART / "README.md"
    file.write_text(with_table(file.read_text()))

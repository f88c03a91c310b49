"""What a supervisor wants of a cluster, as the one after it finds it: which workers there shall be."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from ...fleet.report import Role

VERSION = 1


class Wanted(NamedTuple):
    """A worker that shall run."""

    role: Role
    address: str = ""  # where it was last


@dataclass(frozen=True, kw_only=True)
class Desired:
    """`configured` are the numbers of the settings file at that time: where they are others now, they win."""

    configured: Mapping[Role, int] = field(default_factory=dict)
    workers: Mapping[str, Wanted] = field(default_factory=dict)  # by name

    def to_json(self) -> bytes:
        """For `from_json`."""
        return json.dumps(
            {"version": VERSION, "configured": dict(self.configured), "workers": dict(self.workers)}
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self | None:
        """None where another version wrote it, which meant something else."""
        read = json.loads(data)
        if read.get("version") != VERSION:
            return None
        workers = {name: Wanted(*wanted) for name, wanted in read["workers"].items()}
        return cls(configured=read["configured"], workers=workers)

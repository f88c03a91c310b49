"""API keys for a gateway of a test."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.cluster.access.key_file import KeyDocument, change
from isthmus.cluster.access.keys import KeyRecord, new_key
from isthmus.cluster.access.settings import Limits


@dataclass
class Keys:
    """A file of keys and, by name, the keys themselves."""

    path: Path
    keys: dict[str, str] = field(default_factory=dict)
    records: dict[str, KeyRecord] = field(default_factory=dict)

    def add(self, name: str, tenant: str = "", **limits: Any) -> str:
        key, record = new_key(tenant or name, limits=Limits(**limits))
        change(self.path, lambda document: KeyDocument(keys=(*document.keys, record)))
        self.keys[name], self.records[name] = key, record
        return key

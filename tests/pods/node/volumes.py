"""The volumes of a pod as folders of this machine: what is in a ConfigMap or Secret, what is empty, what is claimed."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .objects import Object, Objects, quantity


def make_volumes(pod: Object, folder: Path, objects: Objects, claims: Mapping[str, Path]) -> dict[str, Path]:
    """By their names. `claims` has the folder of each PersistentVolumeClaim that a pod may mount.

    Ownership is what kubelet gives: files belong to root and the pod's fsGroup, which may read them; an emptyDir is
    open to all.
    """
    group = (pod["spec"].get("securityContext") or {}).get("fsGroup")
    made = {}
    for volume in pod["spec"].get("volumes") or ():
        made[volume["name"]] = path = folder / volume["name"]
        if "emptyDir" in volume:
            path.mkdir(parents=True)
            if volume["emptyDir"].get("medium") == "Memory":
                size = int(quantity(volume["emptyDir"].get("sizeLimit") or "64Mi"))
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
            path.chmod(0o2777 if group else 0o777)
            os.chown(path, 0, group or 0)
        elif "persistentVolumeClaim" in volume:
            made[volume["name"]] = claims[volume["persistentVolumeClaim"]["claimName"]]
        else:
            path.mkdir(parents=True)
            for name, (content, mode) in _files(volume, objects).items():
                _write(path / name, content, mode, group)
            path.chmod(0o755)
    return made


def remove_volumes(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_mount():
            subprocess.run(["umount", path], check=True)
    shutil.rmtree(folder, ignore_errors=True)


def _files(volume: Object, objects: Objects) -> dict[str, tuple[bytes, int]]:
    """Content and mode by path within the volume."""
    match volume:
        case {"configMap": source}:
            data = objects.data("ConfigMap", source["name"])
        case {"secret": source}:
            data = objects.data("Secret", source["secretName"])
        case _:
            raise AssertionError(f"no volume of a kind that is known here: {volume}")
    mode: int = source.get("defaultMode", 0o644)
    items: list[Object] = source.get("items") or [{"key": key, "path": key} for key in data]
    return {item["path"]: (data[item["key"]], item.get("mode", mode)) for item in items}


def _write(path: Path, content: bytes, mode: int, group: int | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode | 0o440 if group else mode)
    os.chown(path, 0, group or 0)

"""Becomes a container's main process: `python launch.py SPEC.json`, in namespaces of its own.

Lays out the container's root (what an image has, read-only; the pod's volumes), enters it and its control group, gives
up what its security context forbids, and runs its command in its own place. `Container` in `container.py` writes SPEC.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def main(spec: dict[str, Any]) -> None:
    root = Path(spec["root"])
    mount("-t", "tmpfs", "-o", "mode=755", "root", str(root))
    for path in spec["image"]:  # what the image has
        bind(path, root / path.lstrip("/"), read_only=True)
    shutil.copytree(spec["etc"], root / "etc", symlinks=True)  # volumes may be mounted in it
    home, user = spec["home"]
    os.chown(folder(root / home.lstrip("/")), user, user)
    mount("-t", "proc", "proc", folder(root / "proc"))
    mount("-t", "sysfs", "-o", "ro", "sysfs", folder(root / "sys"))
    devices(root / "dev")
    folder(root / "tmp")
    (root / "tmp").chmod(0o1777)
    for source, target, read_only in sorted(spec["mounts"], key=lambda mount: mount[1]):
        bind(source, root / target.lstrip("/"), read_only=read_only)
    if spec["read_only_root"]:
        mount("-o", "remount,ro", str(root))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # which this process may not be allowed to raise
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
    Path(spec["cgroup"], "cgroup.procs").write_text("0")  # this process, and all that come of it
    os.chroot(root)
    os.chdir(spec["folder"])
    command = [*spec["privileges"], *spec["command"]]
    os.execvpe(command[0], command, spec["environment"])


def bind(source: str, target: Path, *, read_only: bool) -> None:
    if Path(source).is_symlink():  # /bin, /lib
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.readlink(source))
        return
    if Path(source).is_dir():
        folder(target)
    elif not target.exists():
        folder(target.parent)
        target.touch()
    mount("--rbind", source, str(target))
    if read_only:
        mount("-o", "remount,bind,ro", str(target))


def devices(path: Path) -> None:
    mount("-t", "tmpfs", "-o", "mode=755", "dev", folder(path))
    for name in DEVICES:
        (path / name).touch()
        mount("--bind", f"/dev/{name}", str(path / name))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        (path / name).symlink_to(f"/proc/self/fd/{number}")
    (path / "fd").symlink_to("/proc/self/fd")
    mount("-t", "tmpfs", "-o", "mode=1777,size=64m", "shm", folder(path / "shm"))  # a runtime's default


def folder(path: Path) -> str:
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

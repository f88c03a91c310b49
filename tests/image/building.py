"""Builds the image by `make image` in a store of its own, and runs commands in it."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from image.host import PipSettings, make_base, pip_settings

BASE = "localhost/isthmus-base:bookworm"


class Store:
    """Images under one folder, apart from any other of this machine's; Buildah shares no process or socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pip: PipSettings = pip_settings()
        self.driver = _driver(folder)
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "{self.driver}"\ngraphroot = "{folder}/images"\nrunroot = "{folder}/run"\n'
        )
        (folder / "pip.conf").touch(mode=0o600)
        (folder / "pip.conf").write_text(self.pip.text)
        self.environment = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(folder),
        }

    def buildah(self, *arguments: str | Path) -> str:
        command = ["buildah", *map(str, arguments)]
        return subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    def make_base(self) -> None:
        """A no-op where the store has it already."""
        if BASE in self.buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
            return
        make_base(self.folder / "base.tar")
        (self.folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        self.buildah("build", "--quiet", "--tag", BASE, self.folder)
        (self.folder / "base.tar").unlink()

    def build(self, tree: Path, image: str) -> tuple[str, float]:
        """What `make image` printed in this tree, and the seconds that it took."""
        volumes = [f"--volume {here}:{there}:ro" for here, there in self.pip.mounted.items()]
        arguments = {
            "BUILDER": "buildah",
            "BASE": BASE,
            "IMAGE": image,
            "CONSTRAINTS": "constraints-cpu.txt",
            "WEIGHTS": "1",
            "PIP_CONF": str(self.folder / "pip.conf"),
            "BUILD_FLAGS": " ".join(volumes),
        }
        command = ["make", "--no-print-directory", "image", *(f"{name}={value}" for name, value in arguments.items())]
        begun = time.monotonic()
        done = subprocess.run(
            command, cwd=tree, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout, time.monotonic() - begun

    def clear(self) -> None:
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")


@contextmanager
def opened_store(kept: str | None) -> Iterator[Store]:
    """A store in a folder that is kept for the next time, or else in one that is gone at the end."""
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="isthmus-image-", dir="/var/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    try:
        yield store
    finally:
        store.buildah("rm", "--all")
        if not kept:
            store.clear()
            shutil.rmtree(folder)


class Container:
    """The files of an image, mounted, and the environment that it sets."""

    def __init__(self, store: Store, image: str) -> None:
        self.name = store.buildah("from", image).strip()
        self.root = Path(store.buildah("mount", self.name).strip())
        self.inspected = store.buildah("inspect", self.name)
        self.config: dict[str, Any] = json.loads(self.inspected)["OCIv1"]["config"]
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost pod\n")  # a container's runtime writes it

    def start(self, *command: str, **environment: str) -> "subprocess.Popen[str]":
        """The command in a pod of its own, with output and errors in one stream."""
        apart = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "bash"]
        variables = [*self.config["Env"], *(f"{name}={value}" for name, value in environment.items())]
        script = Path(__file__).with_name("pod.sh")
        return subprocess.Popen(
            [*apart, script, self.root, *variables, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, timeout: float = 60, **environment: str) -> tuple[int, str]:
        """Its exit status, and what it printed."""
        with self.start(*command, **environment) as process:
            try:
                printed, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return process.returncode, printed


def _driver(folder: Path) -> str:
    """Overlay where this file system can, else whole copies of each layer."""
    layers = [folder / "probe" / name for name in ("lower", "upper", "work", "merged")]
    for layer in layers:
        layer.mkdir(parents=True, exist_ok=True)
    lower, upper, work, merged = layers
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mount = ["unshare", "--mount", "mount", "-t", "overlay", "-o", options, "overlay", merged]
    works = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    shutil.rmtree(folder / "probe")
    return "overlay" if works else "vfs"

"""What building an image borrows from the machine it is built on: pip's settings, and a base of Debian's packages."""

import ast
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

NEEDED = ("buildah", "mmdebstrap", "unshare", "ip", "gcc")
INSTALL = "apt-get install --no-install-recommends buildah mmdebstrap iproute2 gcc libc6-dev"


def missing_tools() -> list[str]:
    return [name for name in NEEDED if shutil.which(name) is None]


@dataclass(frozen=True)
class PipSettings:
    """`text` is a pip.conf for a build that sees each path of this machine, of `mounted`, at another one."""

    text: str
    values: tuple[str, ...]
    mounted: dict[Path, Path]


def pip_settings() -> PipSettings:
    """What pip would use here, from its files and environment, the later winning, as one file.

    Folders and files that it names are for mounting below /mnt: in their own places the image might have its own.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    merged: dict[str, str] = {}
    for key, quoted in sorted((line.split("=", 1) for line in listed.splitlines()), key=lambda pair: _order(pair[0])):
        merged[key.rpartition(".")[2]] = ast.literal_eval(quoted)
    words = [word for value in merged.values() for word in value.split()]
    mounted: dict[Path, Path] = {}
    for path in filter(None, map(_local, words)):
        mounted.setdefault(path, Path(f"/mnt/pip-{len(mounted)}"))
    lines = [f"{key} = {' '.join(_moved(word, mounted) for word in value.split())}" for key, value in merged.items()]
    return PipSettings("\n".join(["[global]", *lines, ""]), tuple(words), mounted)


def _order(key: str) -> int:
    return {"global": 0, "install": 1, ":env:": 2}.get(key.partition(".")[0], -1)


def _local(word: str) -> Path | None:
    """What of this machine a word of pip's settings means. The pages of an index link to files beside it."""
    path = Path(unquote(urlsplit(word).path)).parent if word.startswith("file:") else Path(word)
    return path if path.is_absolute() and path.exists() else None


def _moved(word: str, mounted: dict[Path, Path]) -> str:
    path = _local(word)
    if path is None:
        return word
    return f"file://{mounted[path]}/{word.rpartition('/')[2]}" if word.startswith("file:") else str(mounted[path])


def make_base(archive: Path) -> None:
    """The smallest Debian 12 with Python, from the mirrors that apt uses here; nothing of this machine is in it."""
    sources = [path for path in Path("/etc/apt/sources.list.d").glob("*.sources") if "debian" in path.name]
    sources += [path for path in [Path("/etc/apt/sources.list")] if path.exists() and path.read_text().strip()]
    forget = "--customize-hook=rm -f $1/etc/resolv.conf $1/etc/hostname"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates,python3", forget]
    subprocess.run([*command, "bookworm", archive, *sources], check=True)

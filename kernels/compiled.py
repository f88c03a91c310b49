"""Functions compiled by Numba and kept on disk for as long as nothing in this folder changes.

Numba itself looks at a function's own file only, and would run what it compiled with other files' functions as those
were before.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import config

_config: Any = config


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: machine code that lets go of the interpreter's lock. `options` are those of `numba.njit`."""
    return njit(nogil=True, cache=True, **options)


def _folder() -> Path:
    """`$ISTHMUS_CACHE/compiled` or `~/.cache/isthmus/compiled`, and in it one for these very sources."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    own, shared = os.environ.get("ISTHMUS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    base = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "isthmus"
    return base / "compiled" / hashlib.sha256(sources).hexdigest()[:16]


if not _config.CACHE_DIR:  # the user's own choice, NUMBA_CACHE_DIR
    _config.CACHE_DIR = str(_folder())

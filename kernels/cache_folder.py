"""Where this project keeps what it can make again."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$ISTHMUS_CACHE`, else `$XDG_CACHE_HOME/isthmus`, else `~/.cache/isthmus`; it need not exist.

    A user without a home has it in the folder of temporary files.
    """
    if own := os.environ.get("ISTHMUS_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "isthmus"
    try:
        return Path.home() / ".cache" / "isthmus"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"isthmus-{os.getuid()}"

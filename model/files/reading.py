"""What a library raises of a model's file, told as what it is: a fault of that file, in one line with its name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...proto.errors import InvalidRequest, IsthmusError

MAX_REASON = 300
_PANICS = "pyo3_runtime"  # where the class of a panic in Rust says it is from; it is no Exception
_PLAIN = (ValueError, OSError, Exception)  # whose text says enough without their name


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Whatever is raised within becomes InvalidRequest: "{what} cannot be loaded: {reason}".

    Libraries raise anything of a damaged file (KeyError, TypeError, bare Exceptions, panics). Errors of ours, failed
    assertions and want of memory are raised as they are.
    """
    try:
        yield
    except (IsthmusError, AssertionError, MemoryError):
        raise
    except Exception as error:
        raise InvalidRequest(f"{what} cannot be loaded: {reason_of(error)}") from error
    except BaseException as error:
        if type(error).__module__ != _PANICS:
            raise
        raise InvalidRequest(f"{what} cannot be loaded: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """An exception in one line, with its class where its text alone says little."""
    text = " ".join(str(error).split())[:MAX_REASON]
    name = type(error).__name__
    if not text:
        return name
    return text if type(error) in _PLAIN else f"{name}: {text}"

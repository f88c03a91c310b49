"""Whether Numba compiles something in this process now: that may take many seconds in the middle of a step."""

from numba.core import event


class _Running(event.Listener):
    def __init__(self) -> None:
        self.count = 0

    def on_start(self, event: event.Event) -> None:
        self.count += 1

    def on_end(self, event: event.Event) -> None:
        self.count -= 1


_running = _Running()
event.register("numba:compile", _running)


def is_compiling() -> bool:
    """From any thread."""
    return _running.count > 0

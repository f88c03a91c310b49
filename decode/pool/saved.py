"""Pages of a preempted request in host memory."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SavedPages:
    """Exact copies of what the pool held, layer by layer; what each tensor is, the store knows that made it."""

    packed: tuple[int, int]  # pages [from, to) are packed, all others raw
    layers: tuple[tuple[Tensor, ...], ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

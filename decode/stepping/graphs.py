"""CUDA graphs: what a call launches on a GPU is recorded once, and then started as one.

A decode step launches some hundred kernels of a few microseconds each, and launching one from Python takes longer than
that. A graph has the addresses and shapes of its recording: what differs between steps is written into the same tensors
beforehand (`padded_steps.py`).
"""

from collections.abc import Callable

import torch

from ...kernels.fast_paths import compiles_allowed

Call = Callable[[], object]
Record = Callable[[Call], Call]
"""Runs a call and records it; what it returns does the same again. RuntimeError where it cannot be recorded."""


def recorder(device: torch.device) -> Record | None:
    """What records for that device; None where nothing is to be gained (a CPU), or nothing compiled is to run."""
    return CudaRecorder(device) if device.type == "cuda" and compiles_allowed() else None


class CudaRecorder:
    """See `Record`. All recordings share memory for what they compute on the way, so that no two may run at once.

    A call may neither wait for the GPU nor copy from the host, and every tensor that it reads or writes and that it
    does not make itself must outlive its recording.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, call: Call) -> Call:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            call()  # compiles kernels and makes constants, neither of which can be done while recording
            graph = torch.cuda.CUDAGraph()
            # Only what this thread does counts: others of the process may use the GPU meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                call()
        return graph.replay

"""What a worker process keeps of the work it has done."""

import os
import subprocess
import sys

from isthmus.cluster.launch.worker_thread import thread_settings

GROWTH = """
import torch
from torch import nn
from isthmus.model.cpu.linear import BlockedLinear
torch.set_num_threads(1)
layers = [BlockedLinear(nn.Linear(64, width)) for width in (64, 128, 256, 512)]

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4 // 1024

def run(counts):
    with torch.inference_mode():
        for rows in counts:
            for layer in layers:
                layer(torch.ones(rows, 64))
    return resident_mb()

first = run(range(4, 104))
print(run(range(104, 504)) - first)
"""


def test_prompts_of_new_lengths_make_no_worker_grow() -> None:
    """PyTorch keeps code for each number of rows that a layer was given: 1,600 of them took 400 MB and more."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH],
        env=os.environ | thread_settings(1),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(done.stdout) < 120

"""What makes a transformers model fast on a CPU without changing what it computes."""

import ctypes
import re
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..kernels.decode_attention import compile_decode_attention
from ..kernels.half_gemm import compile_half_gemm
from ..kernels.row_ops import compile_row_ops
from ..kernels.unpack_cpu import compile_pages
from .fused_layer import fuse_layers
from .fusion import fuse
from .linear import pack_linear_layers

# glibc, malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 30


def speed_up(net: PreTrainedModel) -> None:
    """Prepares a loaded model on a CPU: fused and packed weights, memory that is kept. Outputs stay the same.

    Weights of linear layers that fp16 holds are kept in it alone; others then lie in memory twice.
    """
    if net.dtype == torch.float32:
        compile_row_ops()
        compile_half_gemm()
    with torch.inference_mode():
        fuse(net)
        pack_linear_layers(net)
        fuse_layers(net)
    compile_decode_attention(net.dtype)
    compile_pages(net.dtype)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Has malloc keep what is freed from now on, for this process; does nothing where malloc is not glibc's.

    What was freed before, while the model was loaded, goes back to the system.

    Activations of a few MB are otherwise mapped and unmapped by every operation, and faulting their pages in costs
    more than computing them: 2 to 4 times the time of a norm or an activation function over 512 tokens.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError):
        return
    malloc_trim(0)
    mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


@cache
def computes_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (x86: AMX or AVX512_BF16; ARM: BF16)."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", cpuinfo) is not None

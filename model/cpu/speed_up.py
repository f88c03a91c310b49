"""What makes a transformers model fast on a CPU without changing what it computes: the door of this folder.

Other folders use `speed_up` and `computes_bf16` and nothing else of it (`tests/test_layering.py`).
"""

import ctypes
import logging
import re
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from ...kernels.attention.chunk import has_flash
from ...kernels.attention.decode import has_decode_attention
from ...kernels.cpu.half_gemm import has_half_tiles
from ...kernels.cpu.row_ops import has_row_ops
from ...kernels.fast_paths import SETTING, alike, compiles_allowed, is_allowed, spread, works
from ...kernels.pages.unpack_cpu import packs_compiled
from ..lean_imports import PreTrainedModel
from .fused_layer import fuse_layers
from .fusion import fuse
from .linear import pack_linear_layers

log = logging.getLogger(__name__)

BF16_SETTING = "ISTHMUS_BF16"  # never: a CPU's bf16 units stay unused, and sums do not depend on the batch

# glibc, malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 30


def speed_up(net: PreTrainedModel) -> None:
    """Prepares a loaded model on a CPU: fused and packed weights, memory that is kept. Outputs stay the same.

    Weights of linear layers that fp16 holds are kept in it alone; others then lie in memory twice. Each of these is
    tried here, or read from disk and tried, so that no request waits for that; what does not work stays plain, and the
    log says why. With ISTHMUS_COMPILED=never all of it stays plain.
    """
    keep_freed_memory()
    if not compiles_allowed():
        log.warning("%s=never: the model runs through plain PyTorch, without compiled, fused or packed parts", SETTING)
        return
    if net.dtype == torch.float32:
        has_row_ops()
        has_half_tiles()
    with torch.inference_mode():
        fuse(net)
        pack_linear_layers(net)
        fuse_layers(net)
    has_flash(net.dtype)
    has_decode_attention(net.dtype)
    packs_compiled(net.dtype)


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
    """Whether the CPU multiplies bf16 natively, so that a model of bf16 is run in it: a product in bf16 is right and
    takes no longer than in fp32.

    It decides in what numbers a model is computed, not whether a fast path is taken, so that it does not depend on
    ISTHMUS_COMPILED. A CPU that names no such units (x86: AMX or AVX512_BF16; ARM: BF16) is not tried: it emulates
    them. With ISTHMUS_BF16=never its units are not used; WrongSetting where that is neither auto nor never.
    """
    return is_allowed(BF16_SETTING) and _names_bf16_units() and works("arithmetic in bf16", _bf16_is_native)


def _names_bf16_units() -> bool:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", cpuinfo) is not None


def _bf16_is_native() -> bool:
    """Native units take half the time of fp32 or less, emulation of them twice or more: between them there is room for
    what a busy machine does to the best of five. RuntimeError where it is emulated."""
    x, weight, best_s = spread(64, 512), spread(512, 512), dict[torch.dtype, float]()
    wide, narrow = (x, weight), (x.bfloat16(), weight.bfloat16())
    if not alike(F.linear(*narrow).float(), F.linear(*wide), 2e-2):
        return False
    for x, weight in (wide, narrow) * 5:
        start = time.perf_counter()
        F.linear(x, weight)
        best_s[x.dtype] = min(best_s.get(x.dtype, float("inf")), time.perf_counter() - start)
    if best_s[torch.bfloat16] > 1.4 * best_s[torch.float32]:
        raise RuntimeError("slower than fp32: it is emulated")
    return True

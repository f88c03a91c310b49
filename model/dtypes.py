"""The dtypes that a model can be run in, by the names that settings and commands know. No torch: commands ask this."""

from typing import Literal, get_args

Dtype = Literal["auto", "float32", "fp32", "bfloat16", "bf16", "float16", "fp16"]
"""Of weights, and of KV where the device computes in it; auto: what the device is fast at; float16 on GPUs only."""

DTYPES: tuple[str, ...] = get_args(Dtype)
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def full_name(dtype: str) -> str:
    """The name that PyTorch knows of one of DTYPES other than auto."""
    return _SHORT.get(dtype, dtype)

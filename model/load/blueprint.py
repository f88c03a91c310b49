"""The size of a model whose weights are not read: made without memory, with two tokens run through it."""

import torch
from transformers import AutoModelForCausalLM

from ...kernels.cpu.half_gemm import has_half_tiles
from ...kernels.fast_paths import compiles_allowed
from ...kernels.shapes import LayerShape
from ...proto.errors import InvalidRequest
from .. import attention
from ..cpu.speed_up import computes_bf16
from ..memory import ModelSize, make_size
from .describe import describe_model
from .loader import choose, servable_config
from .probe import probe_shapes


def blueprint(source: str, *, dtype: str = "auto", device: str = "auto") -> ModelSize:
    """What `size_of` would say of the loaded model; arguments and errors as `load_model`."""
    number, place = choose(dtype, device)
    about = describe_model(source)
    config = servable_config(about.path)
    with torch.device("meta"):  # in bf16, whatever the dtype: experts' products have no other form without memory
        net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    try:
        shapes = probe_shapes(net)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{about.architecture} cannot be measured without its weights: {error}") from error
    on_cpu = place.type == "cpu"
    return make_size(
        net.config.get_text_config(decoder=True),
        layers=[LayerShape(kv_heads=heads, head_dim=dim) for heads, dim in shapes],
        dtype=torch.float32 if on_cpu and not computes_bf16() else number,
        device=place,
        context_length=about.context_length,
        vocab_size=about.vocab_size,
        weight_bytes=_weights_on_cpu(net, number) if on_cpu else _count(net) * number.itemsize,
    )


def _weights_on_cpu(net: torch.nn.Module, weights: torch.dtype) -> int:
    """Linear layers lie there twice, as they are and in the layout that is fast, or once in fp16 (`cpu/linear.py`)."""
    itemsize = weights.itemsize if computes_bf16() else 4
    if not compiles_allowed():
        return itemsize * _count(net)
    linear = sum(layer.weight.numel() for layer in net.modules() if isinstance(layer, torch.nn.Linear))
    if has_half_tiles() and weights == torch.bfloat16 and not computes_bf16():
        tied = {id(layer.weight) for layer in net.modules() if isinstance(layer, torch.nn.Linear)}
        others = sum(parameter.numel() for parameter in net.parameters() if id(parameter) not in tied)
        embedding = sum(e.weight.numel() for e in net.modules() if isinstance(e, torch.nn.Embedding))
        return 2 * linear + 4 * max(others, embedding)
    return itemsize * (_count(net) + linear)


def _count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())

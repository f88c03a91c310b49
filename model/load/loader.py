"""Loading a model for a worker: weights into transformers' own classes, with our attention."""

import threading
import warnings
from pathlib import Path
from typing import Any

import torch

from ...kernels.cpu.half_gemm import has_half_tiles
from ...kernels.fast_paths import WrongSetting, compiles_allowed
from ...kernels.shapes import LayerShape
from ...proto.errors import InvalidRequest
from .. import attention
from ..cpu.speed_up import computes_bf16, speed_up
from ..dtypes import DTYPES, full_name
from ..files.reading import reading
from ..lean_imports import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, hf_logging, lean
from ..memory import refuse_oversized
from ..model import Model
from ..phases import phase
from .describe import describe_model
from .probe import probe_layers

_loading = threading.Lock()  # transformers sets process-wide defaults (dtype, initialisers) while it loads


def load_model(source: str, *, dtype: str = "auto", device: str = "auto", manifest: str | None = None) -> Model:
    """The model of a source (`sources.py` says which there are), ready to run.

    dtype: one of `dtypes.DTYPES`. On a CPU that does not multiply bf16, "bfloat16" is that of the weights alone:
    activations and KV are fp32 (`Model.dtype`), which is both faster there and more exact.
    device: "cpu", "cuda", "cuda:1", ... or "auto": the first GPU where there is one.
    manifest: the file that says what the source's files are (`model/files/manifest.py`).
    NotFound or Unavailable where there is no such model, InvalidRequest where it is there and cannot be served.
    """
    place = _device(device)
    number = _dtype(dtype, place)
    about = describe_model(source, manifest)
    refuse_oversized(about.path, place, number)
    with _loading, lean():
        with phase("load"):
            net = _load_net(about.path, number, place)
        weights = number
        if place.type == "cpu":
            with phase("speed_up"):
                if not computes_bf16():
                    net, number = net.float(), torch.float32
                speed_up(net)
        config = net.config.get_text_config(decoder=True)
        with phase("probe"):
            layers = _probe(net, about.architecture, config.num_hidden_layers, about.context_length)
    return Model(
        name=about.name,
        fingerprint=about.fingerprint,
        architecture=about.architecture,
        path=about.path,
        context_length=about.context_length,
        vocab_size=about.vocab_size,
        eos_token_ids=about.eos_token_ids,
        layers=layers,
        dtype=number,
        weight_dtype=weights,
        device=place,
        net=net,
    )


def _load_net(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    _quiet()
    config = servable_config(path)
    with reading(f"the model in {path}"):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                output_loading_info=True,
                config=config,
                dtype=dtype,
                attn_implementation=attention.NAME,
                device_map={"": device} if device.type != "cpu" else None,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
        except KeyError as error:
            if error.args == (attention.NAME,):  # older model code, with its own table
                raise InvalidRequest(f"{config.model_type} does not use transformers' attention interface") from None
            raise
    net, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers would run with random ones
        raise InvalidRequest(f"weights are missing in {path}: {', '.join(missing[:3])} ({len(missing)} in all)")
    return net.eval()


def _read_config(path: Path) -> PretrainedConfig:
    with reading(path / "config.json"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def _probe(net: PreTrainedModel, architecture: str, layers: int, context_length: int) -> tuple[LayerShape, ...]:
    try:
        return probe_layers(net, layers, context_length)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"{architecture} does not run through transformers' attention interface: {_first_line(error)}"
        ) from error


def refuse_inexact(config: PretrainedConfig) -> None:
    """InvalidRequest for what the config says cannot be exact here; `probe.py` finds the rest by running the model."""
    if config.is_encoder_decoder:
        raise InvalidRequest(f"{config.model_type} is an encoder-decoder model; only decoder-only models can be served")
    text = config.get_text_config(decoder=True)
    for kind in sorted(set(getattr(text, "layer_types", None) or ())):
        if kind not in ("full_attention", "sliding_attention"):
            raise InvalidRequest(f"layers of type {kind}; allowed: full_attention, sliding_attention")
    for kind in sorted(_rope_types(getattr(text, "rope_parameters", None))):
        if kind in ("dynamic", "longrope"):
            raise InvalidRequest(f"rotary embeddings of type {kind} change with the length of the longest sequence")


def _rope_types(parameters: object) -> set[str]:
    """All rope types in `rope_parameters`, which may be one dict or one dict for each layer type."""
    if not isinstance(parameters, dict):
        return set()
    nested = set().union(*(_rope_types(value) for value in parameters.values()))
    kind = parameters.get("rope_type")
    return nested | ({kind} if isinstance(kind, str) else set())


def _quiet() -> None:
    """Keeps transformers' bars and advice out of a worker's output; its errors still come as exceptions."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise InvalidRequest(f"device is {name!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the weights. With ISTHMUS_COMPILED=never, auto is what nearly every machine takes without it: bf16."""
    try:
        plain, units = not compiles_allowed(), computes_bf16()
    except WrongSetting as error:
        raise InvalidRequest(str(error)) from None
    if name == "auto":
        fast = device.type == "cuda" or plain or units or has_half_tiles()
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise InvalidRequest(f"dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    number = getattr(torch, full_name(name))
    if number == torch.float16 and device.type == "cpu":
        raise InvalidRequest(
            f"dtype is {name!r}, which runs on GPUs only: CPUs emulate its arithmetic; take bfloat16 or float32 "
            "(weights that fp16 holds are kept in it anyway)"
        )
    return number


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def choose(dtype: str, device: str) -> tuple[torch.dtype, torch.device]:
    """The dtype of the weights and the device that `load_model` takes for these settings."""
    place = _device(device)
    return _dtype(dtype, place), place


def servable_config(path: Path) -> PretrainedConfig:
    """The config in a folder; InvalidRequest where it cannot be read, or says that the model cannot be exact here."""
    config = _read_config(path)
    with reading(path / "config.json"):
        refuse_inexact(config)
    return config

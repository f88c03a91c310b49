"""How long a sequence a model's rotary embeddings are made for, by its config.

`max_position_embeddings` means the length that the model was first trained with in some configs, and the length after
scaling in others; which one is settled by the kind of scaling (`modeling_rope_utils.py` of transformers).
"""

import math
from collections.abc import Mapping
from typing import Any

# Their factor stretches `max_position_embeddings`, unless the config says separately what the length was before.
_STRETCHED = frozenset({"linear", "dynamic", "yarn", "proportional"})
# "llama3" and "longrope" have the length after scaling in `max_position_embeddings`: their factor shapes frequencies.


def context_length(config: Mapping[str, Any], trained: int) -> int:
    """Tokens that the text config of a model allows, where its `max_position_embeddings` is `trained`."""
    if "gemma" in str(config.get("model_type", "")):  # their configs have the length after scaling
        return trained
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        return trained
    before = config.get("original_max_position_embeddings")
    return min(_stretched(kind, trained, before) for kind in _kinds(parameters))


def _kinds(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The scaling of every layer type that sees the whole sequence: of all layers, if the config knows no types."""
    nested = {name: value for name, value in parameters.items() if isinstance(value, Mapping)}
    if not nested:
        return [parameters]
    full = nested.get("full_attention")
    return [full] if full is not None else list(nested.values())


def _stretched(kind: Mapping[str, Any], trained: int, before: Any) -> int:
    factor = kind.get("factor")
    before = before or kind.get("original_max_position_embeddings")
    if kind.get("rope_type", kind.get("type")) not in _STRETCHED:
        return trained
    if not isinstance(factor, int | float) or not math.isfinite(factor) or factor < 1:
        return trained
    return max(trained, int(factor * before)) if isinstance(before, int) else int(factor * trained)

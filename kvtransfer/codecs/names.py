"""Names of the codecs; free of torch, so that a gateway can check a request without it."""

DEFAULT_CODEC = "tq-k4v4"

_PACKED_BITS = ((4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))
TQ_BITS = {f"tq-k{key}v{value}": (key, value) for key, value in _PACKED_BITS}

REFERENCES = (
    *(f"turboquant-mse-{bits}" for bits in (4, 3, 2)),
    *(f"turboquant-prod-{bits}" for bits in (4, 3, 2)),
    *("turboquant-3.5", "turboquant-2.5", "polarquant-4", "polarquant-3"),
)


def codec_names() -> tuple[str, ...]:
    """Every codec: the exact one, ours, and the published ones that ours are measured against."""
    return ("raw", "fp8", *TQ_BITS, *REFERENCES)

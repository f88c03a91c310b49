"""Names of the codecs; free of torch, so that a gateway can check a request without it."""

DEFAULT_CODEC = "tq-k4v4"

_PACKED_BITS = ((4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))
TQ_BITS = {f"tq-k{key}v{value}": (key, value) for key, value in _PACKED_BITS}


def codec_names() -> tuple[str, ...]:
    """Every codec, the exact ones first."""
    return ("raw", "fp8", *TQ_BITS)

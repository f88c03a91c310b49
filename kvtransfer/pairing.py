"""What two workers must agree on before KV may pass between them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..kernels.shapes import LayerShape
from ..proto.errors import Incompatible, InvalidRequest, NotFound, shown
from ..proto.rpc.transport import FRAME_MESSAGE_LIMIT
from ..proto.worker_pb2 import WorkerReport
from .codecs.registry import PageCodec, build_codec, codec_names
from .encoded import raw_bytes
from .frame import F32, PROTOCOL_VERSION

MAX_PAGE_BYTES = FRAME_MESSAGE_LIMIT - (1 << 20)  # raw in fp32: a page never spans two messages


class CodecSet:
    """The codecs that one worker allows, made for its model."""

    def __init__(
        self,
        names: Sequence[str],
        default: str,
        layers: Sequence[LayerShape],
        page_tokens: int,
        balance: Sequence[Tensor],
    ) -> None:
        """Names that are given must all fit the model; with none given, those that fit are allowed.

        InvalidRequest for one that does not fit, NotFound for one that does not exist or a default not among them.
        """
        largest = max(raw_bytes(layer, page_tokens, F32) for layer in layers)
        if largest > MAX_PAGE_BYTES:
            raise InvalidRequest(
                f"a page of {page_tokens} tokens of one layer takes {largest} bytes; allowed: {MAX_PAGE_BYTES}"
            )
        self.page_tokens = page_tokens
        self._default = default
        self._codecs: dict[str, PageCodec] = {}
        for name in names or codec_names():
            try:
                self._codecs[name] = build_codec(name, layers, page_tokens, balance)
            except InvalidRequest:
                if names or name == default:
                    raise
        self.get(default)

    def get(self, name: str) -> PageCodec:
        """An allowed codec; NotFound with the list of them for any other."""
        if name not in self._codecs:
            raise NotFound(f"codec {shown(name)} is not allowed here; allowed: {', '.join(self._codecs)}")
        return self._codecs[name]

    def fill_report(self, report: WorkerReport) -> None:
        """Adds what others must match to a report."""
        report.protocol_version = PROTOCOL_VERSION
        report.default_codec = self._default
        report.page_tokens = self.page_tokens
        for name, codec in self._codecs.items():
            report.codecs[name] = codec.params_hash


def require_same(who: str, pairs: Mapping[str, tuple[object, object]]) -> None:
    """Incompatible for the first thing in which the caller's value (first) is not ours (second)."""
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise Incompatible(f"{who} has {what} {ours}; the caller has {_briefly(theirs)}")


def _briefly(value: object) -> object:
    return shown(value) if isinstance(value, str) and (len(value) > 100 or not value.isprintable()) else value

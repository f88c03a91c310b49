"""The receiving side of one transfer: refuses everything that is not exactly what was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.shapes import LayerShape
from ..proto.errors import Corrupt
from ..proto.prefill_pb2 import FirstToken, KvCommit, KvFrame, PromptLogprobs
from .codecs.registry import PageCodec
from .encoded import decode_raw, raw_bytes
from .frame import (
    BF16,
    F32,
    MAX_FRAME_BYTES,
    MAX_SCORED_TOKENS,
    PACKED,
    Binding,
    Digest,
    FrameHeader,
    SectionHeader,
    first_token_checksum,
    frame_checksum,
    prompt_logprobs_checksum,
)
from .page import packed_range


@dataclass(frozen=True)
class ReceivedSection:
    """A section that passed all checks; its bytes are still encoded."""

    header: SectionHeader
    data: memoryview


class KvReceiver:
    """Checks the frames of one transfer in order, and at the commit that nothing is missing.

    It keeps no pages: the engine decodes what `accept` returns. Every refusal is a Corrupt error that names the
    mismatch; nothing is guessed or repaired.
    """

    def __init__(
        self,
        binding: Binding,
        codec: PageCodec,
        layers: Sequence[LayerShape],
        page_tokens: int,
        prompt_tokens: int,
        cached_tokens: int,
        prompt_logprobs: int | None = None,
        forks: int = 0,
    ) -> None:
        """`cached_tokens`: the first tokens of the prompt, which are here already and are not sent. `prompt_logprobs`:
        how many log-probabilities of each token of the prompt are asked for beside its own, if any. `forks`: how
        many more first tokens."""
        self._asked, self._binding, self._codec, self._layers = binding, binding.fields(), codec, layers
        self._page_tokens, self._prompt_tokens = page_tokens, prompt_tokens
        self._packed = packed_range(prompt_tokens, page_tokens, codec.packs)
        self._received = [cached_tokens] * len(layers)  # tokens from the start, per layer: sections come in order
        self._digest = Digest()
        self._top, self._forks = prompt_logprobs, forks
        self._scored = 0  # tokens of the prompt whose log-probabilities came: its first has none
        # A section is a page at least, however large that is.
        self._max_bytes = max(MAX_FRAME_BYTES, *(raw_bytes(layer, page_tokens, F32) for layer in layers))

    def accept(self, frame: KvFrame) -> list[ReceivedSection]:
        """The sections of a frame; Corrupt where anything in it is not as asked for."""
        if len(frame.payload) > self._max_bytes:
            raise Corrupt(f"a frame of {len(frame.payload)} bytes; allowed: {self._max_bytes}")
        if frame_checksum(frame.header, frame.payload) != frame.checksum:
            raise Corrupt(f"frame {self._digest.frames} does not match its checksum")
        header = FrameHeader.unpack(frame.header)
        for name, got, want in zip(_BINDING_NAMES, header.binding, self._binding, strict=False):
            if got != want or type(got) is not type(want):
                raise Corrupt(f"a frame is for {name} {got!r}; asked for {want!r}")
        if len(header.binding) != len(self._binding):
            raise Corrupt("a frame header has the wrong number of fields")
        if header.index != self._digest.frames:
            raise Corrupt(f"frame {header.index} came where frame {self._digest.frames} was due")
        if sum(section.nbytes for section in header.sections) != len(frame.payload):
            raise Corrupt("the sections of a frame do not add up to its payload")
        received, at = [], 0
        for section in header.sections:
            self._check_section(section)
            received.append(ReceivedSection(section, memoryview(frame.payload)[at : at + section.nbytes]))
            at += section.nbytes
        self._digest.add(frame)
        return received

    def check_first(self, first: FirstToken) -> None:
        """Corrupt where a first token was damaged, or is of another transfer."""
        if first_token_checksum(self._asked, first) != first.checksum:
            raise Corrupt("the first token does not match its checksum")
        if len(first.of_forks) != self._forks:
            raise Corrupt(f"{len(first.of_forks)} more first tokens came; asked for {self._forks}")
        if self._top is not None and self._scored != self._prompt_tokens - 1:
            raise Corrupt(
                f"the first token came after {self._scored} log-probabilities of {self._prompt_tokens} tokens"
            )

    def check_prompt_logprobs(self, scored: PromptLogprobs) -> None:
        """Corrupt where log-probabilities of the prompt were damaged, are of another transfer, or not what is due."""
        count, due = len(scored.logprobs), self._scored + 1
        if self._top is None:
            raise Corrupt("log-probabilities of the prompt came that were not asked for")
        if prompt_logprobs_checksum(self._asked, scored) != scored.checksum:
            raise Corrupt("log-probabilities of the prompt do not match their checksum")
        if scored.first != due or not 1 <= count <= min(MAX_SCORED_TOKENS, self._prompt_tokens - due):
            raise Corrupt(f"log-probabilities of {count} tokens from {scored.first} on came where token {due} was due")
        if any(len(token.top) > self._top for token in scored.logprobs):
            raise Corrupt(f"more log-probabilities of a token came than the {self._top} that were asked for")
        self._scored += count

    def finish(self, commit: KvCommit) -> None:
        """Corrupt where the commit does not match what came, or a token of any layer is missing."""
        for layer, received in enumerate(self._received):
            if received != self._prompt_tokens:
                raise Corrupt(f"layer {layer} has {received} of {self._prompt_tokens} tokens at the commit")
        got = (self._digest.frames, self._digest.payload_bytes, self._digest.digest())
        if got != (commit.frames, commit.payload_bytes, commit.digest):
            raise Corrupt("the commit does not match the frames that came")

    def decode(self, section: ReceivedSection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, KV heads, D] of a checked section; called by the engine."""
        header = section.header
        if header.encoding == PACKED:
            page_bytes = self._codec.page_bytes(header.layer)
            pages = torch.frombuffer(bytearray(section.data), dtype=torch.uint8).view(-1, page_bytes)
            return self._codec.decode(header.layer, pages, dtype)
        return decode_raw(section.data, self._layers[header.layer], header.encoding)

    def _check_section(self, section: SectionHeader) -> None:
        if section.layer >= len(self._layers):
            raise Corrupt(f"a section of layer {section.layer}; the model has {len(self._layers)}")
        layer, start, end = self._layers[section.layer], section.start, section.start + section.tokens
        if (section.first_head, section.end_head) != (0, layer.kv_heads):
            raise Corrupt(f"a section of heads {section.first_head} to {section.end_head}; asked for all")
        if not section.tokens or start != self._received[section.layer] or end > self._prompt_tokens:
            due = self._received[section.layer]
            raise Corrupt(f"layer {section.layer}: tokens {start} to {end} came where token {due} was due")
        packed = self._packed[0] <= start < self._packed[1]
        crosses = any(start < bound < end for bound in self._packed)
        if packed != (section.encoding == PACKED) or crosses:
            raise Corrupt(f"layer {section.layer}: tokens {start} to {end} came as {section.encoding}")
        if section.nbytes != self._expected_bytes(layer, section):
            raise Corrupt(f"layer {section.layer}: {section.nbytes} bytes for {section.tokens} tokens")
        self._received[section.layer] = end

    def _expected_bytes(self, layer: LayerShape, section: SectionHeader) -> int:
        if section.encoding == PACKED:
            pages, rest = divmod(section.tokens, self._page_tokens)
            return -1 if rest else pages * self._codec.page_bytes(section.layer)
        exact = not self._codec.packs  # the sender's dtype; otherwise raw pages are bf16
        if section.encoding != BF16 and not (exact and section.encoding == F32):
            raise Corrupt(f"unknown encoding {section.encoding!r}")
        return raw_bytes(layer, section.tokens, section.encoding)


_BINDING_NAMES = (
    *("protocol version", "request", "attempt", "model", "codec", "codec parameters"),
    "prompt",
)

"""The sending side of one transfer: from KV as computed, or as kept, to sections, layer by layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .codecs.checks import check_finite
from .encoded import EncodedPage, EncodedSection, PageFormat, encode_raw, raw_bytes
from .frame import BF16, F32, MAX_FRAME_BYTES, SectionHeader
from .hashing import hash_of_page
from .page import Section, sections


class KvSender:
    """Encodes the pages of one prompt, each into host memory of its own. Used by the engine thread alone.

    Tokens leave in page-aligned steps: `advance` says which sections of the next tokens are due, `encode` makes
    one of them, of one layer, from keys and values, and `resend` from pages that are encoded already. `finished`
    hands over the pages that `encode` has completed, to be kept.
    """

    def __init__(self, form: PageFormat, page_hashes: bytes, prompt_tokens: int, cached_tokens: int) -> None:
        """`cached_tokens`: the first tokens of the prompt, which the receiver has already."""
        self._form, self._hashes, self._prompt_tokens = form, page_hashes, prompt_tokens
        self._sent = cached_tokens
        self._pages: dict[int, EncodedPage] = {}  # that `encode` works on, by first token
        self.bf16_bytes = 0
        token_bytes = max(raw_bytes(layer, 1, F32) for layer in form.layers)
        pages = max(1, MAX_FRAME_BYTES // (token_bytes * form.page_tokens))
        self._section_tokens = pages * form.page_tokens

    def advance(self, computed: int) -> list[Section]:
        """The sections that are due once `computed` tokens exist: whole pages, and the rest at the prompt's end."""
        last = computed == self._prompt_tokens
        end = computed if last else computed - computed % self._form.page_tokens
        if end <= self._sent:
            return []
        due = sections(
            *(self._sent, end, self._prompt_tokens, self._form.page_tokens),
            packs=self._form.codec.packs,
            max_tokens=self._section_tokens,
        )
        self._sent = end
        return due

    def encode(self, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor) -> EncodedSection:
        """Encodes a section of one layer, [tokens, KV heads, D] each, that is due.

        InvalidRequest, naming layer and head, where a value is NaN or infinite.
        """
        return self.resend(layer, section, self.encode_pages(layer, section, keys_THD, values_THD))

    def encode_pages(self, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor) -> Sequence[EncodedPage]:
        """The same where only the pages are wanted, which are complete with their last layer."""
        pages = [self._page(start, section) for start in self._starts(section)]
        if section.packed:
            data = self._form.codec.encode(layer, keys_THD, values_THD)
        else:
            check_finite(layer, keys_THD, values_THD)
            data = encode_raw(keys_THD, values_THD, pages[0].encoding)
        data_PB = data.cpu().contiguous().view(torch.uint8).view(len(pages), -1)
        for page, data_B in zip(pages, data_PB, strict=True):
            page.layer(layer)[:] = data_B.numpy().data
        return pages

    def resend(self, layer: int, section: Section, pages: Sequence[EncodedPage]) -> EncodedSection:
        """A section that is due, of pages that exist; they must be those of the section, in its encoding."""
        shape = self._form.layers[layer]
        parts = tuple(page.layer(layer) for page in pages)
        size = sum(map(len, parts))
        self.bf16_bytes += raw_bytes(shape, section.tokens, BF16)
        header = SectionHeader(layer, 0, shape.kv_heads, section.start, section.tokens, pages[0].encoding, size)
        return EncodedSection(header, parts)

    def finished(self) -> list[EncodedPage]:
        """The full pages encoded since the last call; to be called when all layers of what was due are encoded."""
        done = [page for page in self._pages.values() if page.key is not None]
        self._pages = {}
        return done

    def _starts(self, section: Section) -> range:
        return range(section.start, section.end, self._form.page_tokens)

    def _page(self, start: int, section: Section) -> EncodedPage:
        if start not in self._pages:
            tokens = min(self._form.page_tokens, self._prompt_tokens - start)
            full = tokens == self._form.page_tokens
            page_hash = hash_of_page(self._hashes, start // self._form.page_tokens) if full else b""
            key = self._form.key(page_hash, packed=section.packed) if full else None
            self._pages[start] = self._form.blank(key, tokens, packed=section.packed)
        return self._pages[start]

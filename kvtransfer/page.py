"""Which tokens of a prompt travel raw and which packed, and in what pieces they leave.

    page      0        1        2    ...    n-2      n-1      n (partial)
            [ raw ][ packed ][ packed ... packed ][  raw  ][ raw ]
              sinks                                  newest 64 to 127 tokens

The first page holds the attention sinks, the newest tokens are what the next ones look at most: both stay raw, which
costs nothing at length (measured in `docs/codec.md`).
"""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Section:
    """A range of tokens of one sequence that leaves in one encoding: packed pages, or one raw page or part of one."""

    start: int
    tokens: int
    packed: bool

    @property
    def end(self) -> int:
        return self.start + self.tokens


def packed_range(prompt_tokens: int, page_tokens: int, packs: bool) -> tuple[int, int]:
    """The tokens [start, end) of a prompt that are packed: all but the first page, the last full one and the rest.

    `packs` is that of the codec. The range is empty (start == end) where nothing is packed.
    """
    full_pages = prompt_tokens // page_tokens
    if not packs or full_pages < 3:
        return (0, 0)
    return (page_tokens, (full_pages - 1) * page_tokens)


def sections(
    start: int, end: int, prompt_tokens: int, page_tokens: int, *, packs: bool, max_tokens: int
) -> list[Section]:
    """Cuts the tokens [start, end) of a prompt into raw pages and runs of packed ones.

    A packed section has at most `max_tokens` (a multiple of the page); a raw one is a page, so that a page that is
    kept can be sent again as it is. `start` lies on a page boundary, and so does `end` except at the end of the prompt.
    """
    packed_start, packed_end = packed_range(prompt_tokens, page_tokens, packs)
    bounds = sorted({start, end, *(b for b in (packed_start, packed_end) if start < b < end)})
    pieces = []
    for low, high in pairwise(bounds):
        packed = packed_start <= low < packed_end
        step = max_tokens if packed else page_tokens
        pieces += [Section(at, min(step, high - at), packed) for at in range(low, high, step)]
    return pieces

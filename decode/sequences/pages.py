"""Which pages of a request are packed, final and shared, by how many tokens are stored. Pure; see `pool/base.py`."""

from ...kvtransfer.page import packed_range


def page_to_pack(stored: int, prompt_tokens: int, page_tokens: int, packs: bool) -> int | None:
    """The page that is neither first nor newest any more once `stored` tokens are stored, if there is one.

    Those of the prompt were packed when it was complete.
    """
    if stored % page_tokens or stored <= prompt_tokens:
        return None
    start, end = packed_range(stored, page_tokens, packs)
    return end // page_tokens - 1 if start < end else None


def holdable_tokens(prompt_tokens: int, page_tokens: int, packs: bool) -> int:
    """How many tokens of a prompt may come from final pages: whole ones, and one token at least is computed."""
    pages = (prompt_tokens - 1) // page_tokens
    if packs:  # the last full page is to be raw, as only the first one is where it is final
        pages = min(pages, max(1, prompt_tokens // page_tokens - 1))
    return pages * page_tokens


def final_pages(stored: int, page_tokens: int, packs: bool) -> int:
    """How many pages of a sequence of `stored` tokens are final: where the codec packs, the newest full one is not."""
    full = stored // page_tokens
    return max(min(full, 1), full - 1) if packs else full

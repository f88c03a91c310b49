"""How many raw pages the packed pool has beside its packed ones. Pure."""

RAW_PAGES = 3  # of one request at most: the first, the newest full one, and the one that fills or was just filled


def raw_slots(max_batch: int, *, cached: bool) -> int:
    """Of so many requests; `cached`: first pages are kept too, because without its first page no prefix is found."""
    return max_batch * (RAW_PAGES + cached)

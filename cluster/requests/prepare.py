"""A request made ready for the router: its page hashes, and what a placement depends on."""

from array import array
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count

from ...kvtransfer.hashing import page_hashes, page_salt
from ..fleet.worker_table import WorkerTable
from ..router.costs import Demand
from ..router.prefixes import prefix_keys_of
from ..router.routing_table import Layout
from .request import ResolvedRequest

AFFINITY_TOKENS = 64  # prompts that share so many first tokens go to the same workers when loads are equal


@dataclass(frozen=True, kw_only=True)
class HashedPages:
    """The page hashes of a request, for workers of one layout."""

    layout: Layout
    hashes: bytes


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A request as it is placed: its pages hashed once, and what the router needs to know of it."""

    pages: HashedPages
    demand: Demand


class Preparation:
    """Prepares requests for the workers of a table."""

    def __init__(self, workers: WorkerTable, fingerprint: str) -> None:
        self._workers = workers
        self._fingerprint = fingerprint
        self._numbers = count()

    def prepare(self, request: ResolvedRequest) -> PreparedRequest:
        """Hashes a request's pages in the layout of most workers that could serve it."""
        layouts = self._workers.routing.codec_support(request.codec).layouts
        pages = self.hash_pages(request, layouts[0]) if layouts else HashedPages(layout=(0, ""), hashes=b"")
        beginning = array("I", request.prompt_token_ids[:AFFINITY_TOKENS]).tobytes()
        is_scored = request.sampling.prompt_logprobs is not None  # computed whole, whoever has pages of it
        demand = Demand(
            prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.sampling.max_tokens,
            codec=request.codec,
            affinity=int.from_bytes(blake2b(beginning, digest_size=8).digest(), "big"),
            prefix_keys=() if is_scored else prefix_keys_of(pages.hashes, pages.layout[0]),
            priority=request.priority,
            number=next(self._numbers),
        )
        return PreparedRequest(pages=pages, demand=demand)

    def hash_pages(self, request: ResolvedRequest, layout: Layout) -> HashedPages:
        """The hashes of a request's full pages in one layout."""
        page_tokens, codec_hash = layout
        salt = page_salt(self._fingerprint, request.codec, codec_hash, request.tenant, request.prefix_scope)
        hashes = request.hashed.get((page_tokens, salt))  # the answers to one prompt have the same pages
        if hashes is None:
            hashes = page_hashes(request.prompt_token_ids, page_tokens, salt)
            request.hashed[page_tokens, salt] = hashes
        return HashedPages(layout=layout, hashes=hashes)

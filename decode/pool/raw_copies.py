"""Raw copies of pages whose own numbers have gone through the codec since.

The last full page of a prompt is raw, and packed once newer ones follow. Another prompt that ends in a page of the
same tokens needs it raw: the copy spares it the transfer, or the computing, of that page.
"""

import torch

from ...kvtransfer.pool.allocator import Run
from ...kvtransfer.pool.dense import DensePool
from ...kvtransfer.pool.table import PageTable


class RawCopies:
    """Copies in spare pages of a dense pool. They make room as all pages do that nobody uses, and take nobody's."""

    def __init__(self, pool: DensePool, table: PageTable) -> None:
        self._pool, self._table = pool, table

    def keep(self, runs: tuple[Run, ...], page: int, address: bytes) -> None:
        """Copies a sequence's raw page, rounded as a transfer rounds it. Not where it is here, or no page is empty."""
        if self._table.holds(_name(address)) or not self._table.empty:
            return
        taken = self._table.take(1)
        assert taken is not None
        self._table.publish(taken[0], _name(address))
        if self._table.holds(_name(address)):
            self._copy(runs, page, (Run(taken[0], 1),), 0)
        self._table.release(taken)

    def share(self, address: bytes | None) -> int | None:
        """The copy of the page with that address, kept until `release`; None where there is none."""
        return None if address is None else self._table.share(_name(address))

    def release(self, copy: int) -> None:
        """Ends the use of a copy."""
        self._table.release([copy])

    def restore(self, copy: int, runs: tuple[Run, ...], page: int) -> None:
        """Copies a shared copy to a page of a sequence."""
        self._copy((Run(copy, 1),), 0, runs, page)

    def _copy(self, source: tuple[Run, ...], source_page: int, target: tuple[Run, ...], target_page: int) -> None:
        size = self._pool.page_tokens
        for layer in range(len(self._pool.keys)):
            keys, values = self._pool.read(layer, source, source_page * size, (source_page + 1) * size)
            rounded = (x.to(torch.bfloat16) for x in (keys, values))
            self._pool.write(layer, target, target_page * size, *rounded)


def _name(address: bytes) -> bytes:
    """Of the raw copy: no address is as long."""
    return b"raw " + address

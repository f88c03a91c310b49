"""The files of a model's tokenizer as one zip archive: what a gateway that tokenizes itself asks for."""

import asyncio
import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from smg_grpc_proto.generated.common_pb2 import GetTokenizerChunk

from ...model.files.bounded import MAX_TOKENIZER
from ...proto.errors import InvalidRequest, NotFound

CHUNK_BYTES = 1 << 16
# What makes tokens of text and back, and no more: config.json and generation_config.json may have paths of whoever
# saved them, and defaults of sampling that nobody here goes by.
NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.json", "chat_template.jinja"),
)


class TokenizerFiles:
    """Of one folder; packed at the first call, and kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._packing: asyncio.Future[bytes] | None = None

    async def chunks(self) -> Iterator[GetTokenizerChunk]:
        """The archive in pieces, the last one with its SHA-256. NotFound where there are no files."""
        if self._packing is None or (self._packing.done() and (self._packing.cancelled() or self._packing.exception())):
            self._packing = asyncio.ensure_future(asyncio.to_thread(_packed, self._folder))
        return _cut(await asyncio.shield(self._packing))


def _packed(folder: Path | None) -> bytes:
    found = [folder / name for name in NAMES if (folder / name).is_file()] if folder is not None else []
    if not found:
        raise NotFound("this gateway has no files of its model's tokenizer")
    if (size := sum(path.stat().st_size for path in found)) > MAX_TOKENIZER:
        raise InvalidRequest(f"the tokenizer's files have {size} bytes; allowed: at most {MAX_TOKENIZER}")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in found:
            archive.write(path, path.name)
    return buffer.getvalue()


def _cut(data: bytes) -> Iterator[GetTokenizerChunk]:
    digest = hashlib.sha256(data).hexdigest()
    for start in range(0, len(data), CHUNK_BYTES):
        end = start + CHUNK_BYTES
        yield GetTokenizerChunk(data=data[start:end], sha256=digest if end >= len(data) else "")

"""The page store: how fast pages are written and read, as they are and encrypted, in turns.

    python benchmarks/page_store.py --json page_store.json

A store writes `--mib` of pages, which another one then reads, page after page in one thread. What was just written is
read from the operating system's memory: the figures are what the store itself costs, not what a disk does. Each kind
runs `--rounds` times, in turns with the other; figures are medians.
"""

import argparse
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from support.help import Paragraphs
from support.report import Report, conditions, say

from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.registry import build_codec
from isthmus.kvtransfer.encoded import EncodedPage, PageFormat
from isthmus.kvtransfer.storage.store import QUEUE_BYTES, PageStore

PAGE_TOKENS = 64
# Layers, KV heads and head dimension: SmolLM2-135M, and Llama 3.1 8B.
MODELS = {"smollm2-135m": (30, 3, 64), "llama-8b": (32, 8, 128)}
TENANT = "benchmark"


def make_pages(model: str, codec: str, nbytes: int) -> tuple[PageFormat, list[EncodedPage]]:
    """Pages of random bytes that come to about `nbytes`."""
    count, heads, dim = MODELS[model]
    layers = (LayerShape(kv_heads=heads, head_dim=dim),) * count
    form = PageFormat(
        model_fingerprint=model,
        codec=build_codec(codec, layers, PAGE_TOKENS),
        layers=layers,
        page_tokens=PAGE_TOKENS,
        dtype=torch.float32,
    )
    pages: list[EncodedPage] = []
    while sum(page.nbytes for page in pages) < nbytes:
        page = form.blank(form.key(secrets.token_bytes(16), packed=True), PAGE_TOKENS, packed=True)
        page.data[:] = os.urandom(page.nbytes)
        pages.append(page)
    return form, pages


def measured(folder: Path, form: PageFormat, pages: list[EncodedPage], secret: bytes | None) -> dict[str, float]:
    """GB/s of writing and of reading; AssertionError where a page does not come back."""
    limit, nbytes = 1 << 40, sum(page.nbytes for page in pages)
    began_s = time.perf_counter()
    store = PageStore(folder, limit, secret)
    for page in pages:
        store.enqueue(form, page, TENANT)
    store.close(600)
    written_s = time.perf_counter() - began_s
    assert store.counters["store_writes"] == len(pages), store.counters
    store = PageStore(folder, limit, secret)
    began_s = time.perf_counter()
    found = [store.read(form, page.key, TENANT) for page in pages if page.key is not None]
    read_s = time.perf_counter() - began_s
    assert all(read is not None and read.data == page.data for read, page in zip(found, pages, strict=True))
    store.close()
    return {"write_gb_s": nbytes / written_s / 1e9, "read_gb_s": nbytes / read_s / 1e9}


def compared(model: str, codec: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both kinds for one model."""
    form, pages = make_pages(model, codec, min(args.mib << 20, QUEUE_BYTES - (16 << 20)))
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "encrypted": []}
    for _ in range(args.rounds):
        for kind, secret in (("plain", None), ("encrypted", secrets.token_bytes(32))):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                runs[kind].append(measured(Path(folder) / "pages", form, pages, secret))
    figures = {
        kind: {name: round(statistics.median(run[name] for run in rounds), 3) for name in rounds[0]}
        for kind, rounds in runs.items()
    }
    share = {
        name: round(figures["encrypted"][f"{name}_gb_s"] / figures["plain"][f"{name}_gb_s"], 3)
        for name in ("write", "read")
    }
    return {"model": model, "page_kb": round(pages[0].nbytes / 1e3, 1), "pages": len(pages), **figures, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, default=None, help="where the stores lie; default: that of TMPDIR")
    parser.add_argument("--codec", default="tq-k4v4")
    parser.add_argument("--mib", type=int, default=192, help="of pages, at most what a store lets wait")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with Report(args.json) as report:
        report.put(conditions=conditions(codec=args.codec, mib=args.mib, rounds=args.rounds))
        for model in MODELS:
            say(f"pages of {model}")
            report.append("stores", compared(model, args.codec, args))


if __name__ == "__main__":
    main()

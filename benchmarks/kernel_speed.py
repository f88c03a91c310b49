"""How fast pages are packed, unpacked and attended to.

    python benchmarks/kernel_speed.py --json OUT.json [--quick] [--check]

On a GPU: pack and unpack in GB/s of bf16, and decode attention for the shapes of Llama 3.1 8B (32 query
heads, 8 KV heads, d 128) against bf16 `scaled_dot_product_attention` and what is installed of
FlashAttention and FlashInfer, as a ratio and as share of the copy bandwidth of the same run. On a CPU: the
compiled paths on --threads threads. --check compares the Triton kernels with their references first. Times
are medians.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from support.help import Paragraphs
from support.report import Report, say

from isthmus.kernels.attention.paged import PagedKV, paged_attention_reference
from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.registry import TQ_BITS, build_codec
from isthmus.kvtransfer.codecs.tq import TqCodec

PAGE = 64
HEADS, KV_HEADS, DIM = 32, 8, 128
CPU_SHAPES = ((3, 64), (8, 128), (1, 256))  # KV heads, head dimension: SmolLM2-135M, Llama 3.1 8B, Gemma 3 270M


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--json")
    parser.add_argument("--codecs", default="tq-k4v4,tq-k4v2,tq-k3v3,tq-k2v2")
    parser.add_argument("--quick", action="store_true", help="one batch and one context only")
    parser.add_argument("--check", action="store_true", help="compare the Triton kernels with their references first")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.codecs.split(",")
    with Report(Path(options.json) if options.json else None) as report:
        report.put(date=date.today().isoformat(), torch=torch.__version__)
        if torch.cuda.is_available():
            report.put(device=torch.cuda.get_device_name())
            if options.check:
                say("comparing the kernels with their references")
                report.put(check=check(names))
            report.put(**gpu(names, options.quick))
        else:
            report.put(device=platform.processor() or platform.machine(), threads=options.threads)
            for row in cpu(names):
                report.append("cpu", row)


def cpu(names: list[str]) -> Iterator[dict[str, object]]:
    for name in names:
        for heads, dim in CPU_SHAPES:
            say(f"{name}: {heads} KV heads of {dim}")
            codec = build_codec(name, [LayerShape(kv_heads=heads, head_dim=dim)], PAGE)
            k_THD, v_THD = (torch.randn(2048, heads, dim).bfloat16() for _ in range(2))
            packed = codec.encode(0, k_THD, v_THD)
            size = 2 * k_THD.numel() * 2
            pack_s = host_time(lambda codec=codec, k=k_THD, v=v_THD: codec.encode(0, k, v))
            unpack_s = host_time(lambda codec=codec, p=packed: codec.decode(0, p, torch.bfloat16))
            shape = {"codec": name, "kv_heads": heads, "head_dim": dim}
            yield {**shape, "pack_gb_s": size / pack_s / 1e9, "unpack_gb_s": size / unpack_s / 1e9}


def host_time(call: Callable[[], object]) -> float:
    times = []
    for _ in range(15):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def device_time(call: Callable[[], object]) -> float:
    import triton.testing

    milliseconds: Any = triton.testing.do_bench(call, warmup=30, rep=150, return_mode="median")
    return milliseconds / 1e3


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a device-to-device copy."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / device_time(lambda: target.copy_(source))


def gpu(names: list[str], quick: bool) -> dict[str, object]:
    bandwidth = copy_bandwidth()
    say(f"copy {bandwidth / 1e9:.0f} GB/s")
    rows: list[dict[str, object]] = []
    batches, contexts = ((8,), (32768,)) if quick else ((1, 8, 32), (4096, 32768, 131072))
    for batch in batches:
        for context in contexts:
            if batch * context <= 8 * 131072:
                say(f"attention: batch {batch}, context {context}")
                rows += attention_rows(names, batch, context, bandwidth)
                torch.cuda.empty_cache()
    return {
        "copy_gb_s": bandwidth / 1e9,
        "pages": [page_rates(name, bandwidth) for name in names],
        "attention": rows,
    }


def tq(name: str) -> TqCodec:
    codec = build_codec(name, [LayerShape(kv_heads=KV_HEADS, head_dim=DIM)], PAGE)
    assert isinstance(codec, TqCodec) and name in TQ_BITS
    return codec


def page_rates(name: str, bandwidth: float) -> dict[str, object]:
    """Rates over 65,536 tokens of one layer: 268 MB of bf16, several times the second-level cache."""
    from isthmus.kernels.pages.pack_triton import pack
    from isthmus.kernels.pages.unpack_triton import unpack

    codec, device, pages = tq(name), torch.device("cuda"), 1024
    k_THD, v_THD = (torch.randn(pages * PAGE, KV_HEADS, DIM, device=device).bfloat16() for _ in range(2))
    starts, slots = torch.arange(pages, device=device) * PAGE, torch.arange(pages, device=device)
    rotations = codec.rotations(0, device)
    packed = torch.empty(pages, codec.page_bytes(0), dtype=torch.uint8, device=device)
    pack_s = device_time(lambda: pack(k_THD, v_THD, starts, rotations, codec.layout(0), packed, slots))
    unpack_s = device_time(lambda: unpack(packed, rotations, codec.layout(0), torch.bfloat16))
    size = 2 * 2 * k_THD.numel()
    moved = size + packed.numel()
    row = {"codec": name, "pack_gb_s": size / pack_s / 1e9, "unpack_gb_s": size / unpack_s / 1e9}
    row |= {"pack_share_of_copy": moved / pack_s / bandwidth, "unpack_share_of_copy": moved / unpack_s / bandwidth}
    print(row, flush=True)
    return row


def make_cache(name: str, batch: int, context: int) -> tuple[PagedKV, TqCodec]:
    """Sequences of `context` tokens: first page, last full page and a partial page raw, pages in random
    slots."""
    codec, device = tq(name), torch.device("cuda")
    pages = context // PAGE
    packed = torch.randint(0, 256, (batch * pages, codec.page_bytes(0)), dtype=torch.uint8, device=device)
    heads = packed.view(-1, KV_HEADS, codec.layout(0).head_bytes)
    layout = codec.layout(0)
    for start, size in ((layout.scale_key, 4 * PAGE), (layout.mean_key, 2 * DIM)):
        # Random codes are as good as any; scales and means are numbers of a likely size.
        values = torch.rand(len(packed), KV_HEADS, size // 2, device=device) * 0.03
        kind = torch.float16 if start == layout.scale_key else torch.bfloat16
        heads[:, :, start : start + size] = values.to(kind).view(torch.uint8)
    raw_slots = batch * 3
    raw = [torch.randn(raw_slots, PAGE, KV_HEADS, DIM, device=device).bfloat16() for _ in range(2)]
    table = torch.randperm(batch * pages, device=device).view(batch, pages).int()
    table[:, 0], table[:, pages - 2], table[:, pages - 1] = torch.arange(raw_slots, device=device).view(3, batch).int()
    full = torch.full((batch,), 0, dtype=torch.int32, device=device)
    kv = PagedKV(
        raw_k_RPHD=raw[0],
        raw_v_RPHD=raw[1],
        packed_SB=packed,
        table_BN=table,
        packed_from_B=full + 1,
        packed_to_B=full + pages - 2,
        lengths_B=full + context - 7,
        layout=layout,
    )
    return kv, codec


def attention_rows(names: list[str], batch: int, context: int, bandwidth: float) -> list[dict[str, object]]:
    from isthmus.kernels.attention.paged_triton import paged_attention

    q_BQHD = torch.randn(batch, 1, HEADS, DIM, device="cuda").bfloat16()
    baselines = dense_times(q_BQHD, batch, context)
    best = min(baselines.values())
    rows: list[dict[str, object]] = []
    for library, seconds in baselines.items():
        size = 2 * 2 * batch * context * KV_HEADS * DIM
        about = {"batch": batch, "context": context, "kind": library, "us": seconds * 1e6}
        rows.append({**about, "share_of_copy": size / seconds / bandwidth, "speedup": best / seconds})
    for name in names:
        kv, codec = make_cache(name, batch, context)
        rotations = codec.rotations(0, torch.device("cuda"))
        seconds = graph_time(lambda kv=kv, r=rotations: paged_attention(q_BQHD, kv, r, DIM**-0.5))
        size = batch * (context // PAGE - 3) * codec.page_bytes(0) + batch * 3 * 4 * PAGE * KV_HEADS * DIM
        about = {"batch": batch, "context": context, "kind": name, "us": seconds * 1e6}
        rows.append({**about, "share_of_copy": size / seconds / bandwidth, "speedup": best / seconds})
        del kv
    for row in rows:
        print(row, flush=True)
    return rows


def graph_time(call: Callable[[], object]) -> float:
    """Replays a captured graph, as a decode step does, so that launches from Python do not count."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return device_time(graph.replay)


def dense_times(q_BQHD: torch.Tensor, batch: int, context: int) -> dict[str, float]:
    """Decode attention over contiguous bf16 KV by what is installed."""
    k, v = (torch.randn(batch, context, KV_HEADS, DIM, device="cuda").bfloat16() for _ in range(2))
    q, kt, vt = (x.transpose(1, 2) for x in (q_BQHD, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    times = {"sdpa": graph_time(lambda: sdpa(q, kt, vt, enable_gqa=True))}
    # One query token: the heads of a group as its query rows read K and V once, which SDPA by itself does
    # not.
    grouped = q_BQHD.view(batch, KV_HEADS, HEADS // KV_HEADS, DIM)
    times["sdpa-grouped"] = graph_time(lambda: sdpa(grouped, kt, vt))
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        pass
    else:
        times["flash-attn"] = graph_time(lambda: flash_attn_with_kvcache(q_BQHD, k, v))
    try:
        import flashinfer
    except ImportError:
        pass
    else:
        times["flashinfer"] = device_time(
            lambda: [flashinfer.single_decode_with_kv_cache(q_BQHD[i, 0], k[i], v[i]) for i in range(batch)]
        )
    return times


def check(names: list[str]) -> list[dict[str, object]]:
    """Relative errors of the kernels against the references on this GPU."""
    from isthmus.kernels.attention.paged_triton import paged_attention
    from isthmus.kernels.pages.pack_triton import pack
    from isthmus.kernels.pages.reference import pack_reference, unpack_reference
    from isthmus.kernels.pages.unpack_triton import unpack

    def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((got.double() - wanted.double()).norm() / wanted.double().norm())

    rows: list[dict[str, object]] = []
    for name in names:
        kv, codec = make_cache(name, 3, 640)
        rotations = codec.rotations(0, torch.device("cuda"))
        q_BQHD = torch.randn(3, 4, HEADS, DIM, device="cuda")
        errors = {}
        for window in (None, 200):
            got = paged_attention(q_BQHD, kv, rotations, DIM**-0.5, window)[0]
            wanted = paged_attention_reference(q_BQHD, kv, rotations, DIM**-0.5, window)[0]
            errors[f"attention_window_{window}"] = error(got, wanted)
        k_THD, v_THD = (torch.randn(5 * PAGE, KV_HEADS, DIM, device="cuda") for _ in range(2))
        reference = pack_reference(k_THD, v_THD, rotations, codec.layout(0))
        packed, slots = torch.zeros_like(reference), torch.arange(5, device="cuda")
        pack(k_THD, v_THD, slots * PAGE, rotations, codec.layout(0), packed, slots)
        errors["pack_bytes_that_differ"] = float((packed != reference).float().mean())
        back = unpack(reference, rotations, codec.layout(0), torch.float32)
        dense = unpack_reference(reference, rotations, codec.layout(0), torch.float32)
        errors["unpack"] = max(error(a, b) for a, b in zip(back, dense, strict=True))
        if max(errors.values()) > 0.02:
            raise SystemExit(f"{name}: the kernels differ from their references: {errors}")
        rows.append({"codec": name, **errors})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()

"""What the codecs cost in quality: divergence from bf16 KV, agreement of greedy answers, retrieval of a
needle.

    python benchmarks/quality.py --model smollm2-135m --text TEXT \\
        --context 1024 --windows 4 \\
        --codecs tq-k4v4,tq-k2v2,turboquant-mse-4 --json OUT.json --plot OUT.png

Protocol `all`: everything but the first 4 tokens packed, one forward a window (`--context` tokens).
Protocol `served`: pages as the cluster packs them, while decoding goes on (`--served-context` tokens). The
balance is calibrated as a worker does it, on the text that the project ships, or not at all with
--no-balance. `bits_per_value` counts everything in a packed page.
"""

import argparse
import ctypes
import gzip
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import torch
from quantizers.codec import PUBLISHED, PublishedCodec
from support.help import Paragraphs
from support.quality_protocols import Cache, Correlation, Divergence, add_served, logits_all, step
from support.report import Count, Report

from isthmus.kvtransfer.calibration.balance import calibrate
from isthmus.kvtransfer.calibration.text import TEXT
from isthmus.kvtransfer.codecs.registry import PageCodec, build_codec, codec_names
from isthmus.model.load.loader import load_model
from isthmus.model.model import Model
from isthmus.model.text.tokenizer import Tokenizer

PAGE = 64
FAMILIES = ("tq-", "turboquant-mse", "turboquant-prod", "turboquant-", "polarquant", "fp8")
NEEDLE = "The number of the blue door is {}."


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    model = load_model(options.model, dtype="fp32")
    return_large_memory()
    tokenizer = Tokenizer(model.path)
    ids = torch.tensor(tokenizer.encode(read_text(options.text)))
    balance = None
    if not options.no_balance:
        balance = calibrate(model.forward, tokenizer.encode(TEXT), model.layers, PAGE)
    names = options.codecs.split(",")
    codecs: dict[str, PageCodec] = {
        name: PublishedCodec(name, model.layers, PAGE)
        if name in PUBLISHED
        else build_codec(name, model.layers, PAGE, balance)
        for name in names
    }
    with Report(Path(options.json) if options.json else None) as report:
        report.put(
            model=model.name,
            date=date.today().isoformat(),
            text=Path(options.text).name,
            context=options.context,
            served_context=options.served_context,
            windows=options.windows,
            balance=not options.no_balance,
        )
        rows: list[dict[str, object]] = []
        for protocol in ("all", "served"):
            rows += divergence_rows(protocol, model, codecs, ids, options)
            report.put(rows=rows)
        report.put(greedy_agreement=greedy_agreement(model, codecs, ids, options))
        report.put(needle=needle(model, codecs, tokenizer, ids, options))
        if options.plot:
            plot(report.figures, options.plot)


def return_large_memory() -> None:
    """A loaded model has malloc keep all memory, which the logits of whole windows, hundreds of MB each, fragment."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="UTF-8, plain or .gz; not the calibration text")
    parser.add_argument(
        "--codecs", default=",".join((*codec_names(), *PUBLISHED)), help="`raw` is the reference itself"
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window of protocol all")
    parser.add_argument(
        "--served-context", type=int, default=2048, help="tokens of a window of protocol served; 0: none"
    )
    parser.add_argument("--windows", type=int, default=4, help="of protocol all, spread over the text; 0: none")
    parser.add_argument("--served-windows", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of the greedy agreement; 0: none")
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--needles", type=int, default=10, help="depths of the needle test; 0: none")
    parser.add_argument("--no-balance", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    return parser.parse_args()


def read_text(path: str) -> str:
    data = Path(path).read_bytes()
    return (gzip.decompress(data) if path.endswith(".gz") else data).decode()


def windows_of(ids: torch.Tensor, length: int, count: int) -> list[torch.Tensor]:
    """Evenly spread over the text."""
    if len(ids) < length:
        raise SystemExit(f"the text has {len(ids)} tokens, less than one window of {length}")
    starts = torch.linspace(0, len(ids) - length, count + 2).long()[1:-1]
    return [ids[start : start + length] for start in starts]


def bits_per_value(codec: PageCodec, model: Model) -> float:
    if not codec.packs:
        return 16.0
    size = sum(codec.page_bytes(layer) for layer in range(len(model.layers)))
    return 8 * size / sum(2 * PAGE * s.kv_heads * s.head_dim for s in model.layers)


def divergence_rows(
    protocol: str,
    model: Model,
    codecs: dict[str, PageCodec],
    ids: torch.Tensor,
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    length = options.context if protocol == "all" else options.served_context
    count = options.windows if protocol == "all" else options.served_windows
    if not length or not count:
        return []
    windows = windows_of(ids, length, count)
    task = Count(f"protocol {protocol}", len(windows) * (len(codecs) + 1))
    sums = {name: Divergence() for name in codecs}
    seen = {name: Correlation() for name in codecs}
    for window in windows:
        reference = logits_all(model, window, None, PAGE, Correlation())
        task.advance()
        for name, codec in codecs.items():
            if not codec.packs:
                sums[name].add(reference, reference, window)
            elif protocol == "all":
                sums[name].add(reference, logits_all(model, window, codec, PAGE, seen[name]), window)
            else:
                add_served(sums[name], seen[name], reference, model, window, codec, PAGE)
            task.advance()
    rows: list[dict[str, object]] = []
    for name, codec in codecs.items():
        bits = bits_per_value(codec, model)
        corr = seen[name].worst() if seen[name].by_layer else 1.0
        about = {"protocol": protocol, "codec": name, "bits_per_value": bits, "ratio": 16 / bits}
        rows.append({**about, **sums[name].summary(), "logit_corr_min": corr})
    return rows


def greedy(caches: Sequence[Cache], first: torch.Tensor, count: int) -> torch.Tensor:
    """[sequences, count] of greedy tokens after the first ones."""
    tokens, out = first, []
    for _ in range(count):
        tokens = step(caches, [t[None] for t in tokens]).argmax(-1)
        out.append(tokens)
    return torch.stack(out, 1)


def greedy_agreement(
    model: Model, codecs: dict[str, PageCodec], ids: torch.Tensor, options: argparse.Namespace
) -> list[dict[str, object]]:
    """Share of equal tokens, and tokens before the first that differs, against raw bf16 pages; prompts are
    computed exactly."""
    if not options.prompts:
        return []
    prompt = 6 * PAGE + 17
    task = Count("greedy agreement", options.prompts + len(codecs) + 1)
    caches, first = [], []
    for window in windows_of(ids, prompt, options.prompts):
        cache = Cache(model, None, PAGE, prompt + options.answer_tokens)
        first.append(step([cache], [window], [prompt - 1]).argmax(-1)[0])
        caches.append(cache)
        task.advance()
    exact = greedy([cache.fork(None) for cache in caches], torch.stack(first), options.answer_tokens)
    rows: list[dict[str, object]] = []
    for name, codec in codecs.items():
        task.advance()
        if not codec.packs:
            continue
        answers = greedy([cache.fork(codec) for cache in caches], torch.stack(first), options.answer_tokens)
        same = (answers == exact).float()
        until = same.cumprod(1).sum(1).mean()
        rows.append({"codec": name, "equal": float(same.mean()), "tokens_before_difference": float(until)})
    return rows


def needle(
    model: Model,
    codecs: dict[str, PageCodec],
    tokenizer: Tokenizer,
    ids: torch.Tensor,
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    """Depths at which the right number of ten is the likeliest, and its mean lead over the best wrong one
    in nats."""
    if not options.needles:
        return []
    values = [str(4000 + 523 * i) for i in range(10)]
    endings = [torch.tensor(tokenizer.encode(" " + value)) for value in values]
    special = len(tokenizer.encode("")) if len(tokenizer.encode("")) < 2 else 0  # a token that begins every text
    endings = [ending[special:] for ending in endings]
    filler = ids[: options.context - 64]
    task = Count("needle", options.needles)
    judged: dict[str, PageCodec | None] = {"raw": None, **codecs}
    leads: dict[str, list[float]] = {name: [] for name in judged}
    for depth in range(options.needles):
        right = depth % len(values)
        at = int(len(filler) * (depth + 0.5) / options.needles)
        hidden = torch.tensor(tokenizer.encode("\n" + NEEDLE.format(values[right]) + "\n"))[special:]
        question = torch.tensor(tokenizer.encode("\n" + NEEDLE.partition(" {}")[0]))[special:]
        prompt = torch.cat([filler[:at], hidden, filler[at:], question])
        cache = Cache(model, None, PAGE, len(prompt) + 16)
        step([cache], [prompt[:-1]], [0])
        for name, codec in judged.items():
            fork = cache.fork(codec)
            scores = [score(fork, torch.cat([prompt[-1:], ending])) for ending in endings]
            wrong = max(s for i, s in enumerate(scores) if i != right)
            leads[name].append(scores[right] - wrong)
        task.advance()
    return [
        {"codec": name, "found": sum(x > 0 for x in lead), "of": len(lead), "mean_lead": sum(lead) / len(lead)}
        for name, lead in leads.items()
    ]


def score(cache: Cache, tokens: torch.Tensor) -> float:
    """Log-probability of all tokens after the first one; the cache is left as it was."""
    length = cache.length
    logits = step([cache], [tokens])[:-1].log_softmax(-1)
    cache.length = length
    return float(logits.gather(1, tokens[1:, None]).sum())


def plot(result: Mapping[str, object], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    assert isinstance(rows, list)
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    figure, axes = plt.subplots(1, len(protocols), figsize=(5.5 * len(protocols), 4.2), squeeze=False)
    for axis, protocol in zip(axes[0], protocols, strict=True):
        left = [row for row in rows if row["protocol"] == protocol and row["codec"] != "raw"]
        for family in FAMILIES:
            line = sorted((r["bits_per_value"], r["kl_mean"]) for r in left if r["codec"].startswith(family))
            left = [r for r in left if not r["codec"].startswith(family)]
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", label=family.rstrip("-"))
        axis.set(
            yscale="log", xlabel="bits per value", ylabel="KL from bf16, nats", title=f"{result['model']}: {protocol}"
        )
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

"""Files that are not what they should be: weights, tokenizers, configs, batch files. They are read by a process of its
own (`targets.py`), which may not take more memory or time than a bound."""

import asyncio
import json
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from .inputs import Input, Outcome
from .values import Values

TARGETS = Path(__file__).with_name("targets.py")
LIMIT_S = 30.0  # of one file
ALLOWED = ("read", "refused")  # with one line for a person; all else is a bug
START_S = 120.0  # until the process has imported what it needs
SIZES = (0, 1, 7, 8, 255, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
ODD_JSON: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**400, 1e300, float("nan"), "", "x", "\0", "\ud800", "x" * 100_000),
    *(
        [],
        {},
        [[]],
        {"": {}},
        [0] * 10_000,
        "{{ x }}" * 1000,
        "../../etc/passwd",
        "{% for x in range(10**9) %}a{% endfor %}",
    ),
)


class Parsers:
    """The process that reads files, started again where it dies or hangs."""

    def __init__(self, model: Path, folder: Path, outcome: Outcome) -> None:
        self._folder, self._outcome = folder, outcome
        self._model = model
        self._process: asyncio.subprocess.Process | None = None
        self.answers: Counter[str] = Counter()  # by target, and how it ended
        self.lock = asyncio.Lock()
        self._made = {
            "tokenizer": (model / "tokenizer.json").read_bytes(),
            "tokenizer_config": (model / "tokenizer_config.json").read_bytes(),
            "config": (model / "config.json").read_bytes(),
            "generation_config": (model / "generation_config.json").read_bytes(),
            "safetensors": (model / "model.safetensors").read_bytes(),
            "gguf": _gguf(folder / "whole.gguf"),
            "jsonl": _LINES,
        }

    async def read(self, number: int, rng: random.Random) -> None:
        """Has one file read."""
        target = rng.choice(sorted(self._made))
        data = MAKERS.get(target, _json)(self._made[target], rng)
        made = Input(kind="file", target=target, what=target, number=number, data=data)
        self._outcome.sent(made)
        await self.read_again(made)

    async def read_again(self, made: Input) -> None:
        """Has the file of an input read."""
        target = made.target
        path = self._folder / "input"
        path.write_bytes(made.data)
        if self._process is None:
            await self._start()
        assert self._process is not None and self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"target": target, "path": str(path)}).encode() + b"\n")
        try:
            async with asyncio.timeout(LIMIT_S):
                line = await self._process.stdout.readline()
        except TimeoutError:
            self._outcome.hung(f"reading a file as {target} took more than {LIMIT_S:g} s", "parsers")
            self._outcome.keep(f"hang-{target}", [made])
            await self.stop()
            return
        if not line:
            status = await self._process.wait()
            self._outcome.crashes.append(
                f"reading a file as {target} ended the process with {status}; "
                + self._outcome.keep(f"crash-{target}", [made])
            )
            self._process = None
            return
        answer = json.loads(line)
        self.answers[f"{target}: {answer['ended']}"] += 1
        if answer["ended"] not in ALLOWED:
            self._outcome.failed(f"{target}: {answer['ended']}: {answer['text']}", made)

    async def _start(self) -> None:
        log = (self._folder / "parsers.log").open("ab")
        with log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(TARGETS), str(self._model), str(self._folder)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_S):
            assert await self._process.stdout.readline() == b"ready\n", "see parsers.log"

    async def stop(self) -> None:
        """Ends the process."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        self._process = None


def _json(data: bytes, rng: random.Random) -> bytes:
    """A document with some values replaced, or with its bytes damaged, or nested without end."""
    choice = rng.random()
    if choice < 0.2:
        return _damaged(data, rng)
    if choice < 0.25:
        depth = rng.choice((1000, 100_000))
        return rng.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
    document = json.loads(data)
    for _ in range(rng.randint(1, 4)):
        at: Any = document
        while isinstance(at, dict | list) and at:
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            if rng.random() < 0.4 or not isinstance(at[key], dict | list) or not at[key]:
                at[key] = deepcopy(rng.choice(ODD_JSON))
                break
            at = at[key]
    return json.dumps(document).encode()


def _damaged(data: bytes, rng: random.Random) -> bytes:
    head = 4096  # where a file says what it is
    return Values(rng, {}).damaged(data[:head]) + data[head:]


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    """A header whose length, types, shapes or offsets are not so."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    choice = rng.random()
    if choice < 0.3:
        return struct.pack("<Q", rng.choice(SIZES)) + header + rest
    if choice < 0.5:
        return data[:8] + _damaged(header, rng)[:size].ljust(size) + rest
    if choice < 0.6:
        return data[: rng.randrange(len(data))]
    document = json.loads(header)
    tensor = document[rng.choice([name for name in document if name != "__metadata__"])]
    field = rng.choice(("dtype", "shape", "data_offsets"))
    numbers = [rng.choice((*SIZES, -1)) for _ in range(rng.randint(0, 4))]
    tensor[field] = rng.choice(("F64", "U8", "F8_E4M3", "X", "")) if field == "dtype" else numbers
    changed = json.dumps(document).encode()
    return struct.pack("<Q", len(changed)) + changed + rest


def _gguf_damaged(data: bytes, rng: random.Random) -> bytes:
    """Counts, lengths and types that are not so: numbers of eight bytes anywhere in the head."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.choice((4, 8, 16, rng.randrange(24, 3000)))
        width = rng.choice((4, 8))
        changed[at : at + width] = rng.choice(SIZES).to_bytes(8, "little")[:width]
    return bytes(changed) if rng.random() < 0.8 else _damaged(bytes(changed), rng)


_LINES = b"".join(
    json.dumps(line).encode() + b"\n"
    for line in (
        {"prompt": "hello", "max_tokens": 3, "custom_id": "a"},
        {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "seed": 7, "stop": ["x"]},
        {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 1}},
        {
            "custom_id": "c",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        },
    )
)


def _lines(data: bytes, rng: random.Random) -> bytes:
    """Lines of which some are wrong."""
    made = []
    for line in data.splitlines():
        for _ in range(rng.randint(0, 3)):
            made.append(_json(line, rng) if rng.random() < 0.7 else line)
    return rng.choice((b"\n", b"\r\n", b"\n\n\0")).join(made) + rng.choice((b"", b"\xef\xbb\xbf", b"\xff"))


MAKERS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "safetensors": _safetensors,
    "gguf": _gguf_damaged,
    "jsonl": _lines,
}


def _gguf(path: Path) -> bytes:
    """A small file that is one, of a model with two layers."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(256)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(64)])
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["t 1", "t 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd.weight": (64, 16), "output_norm.weight": (16,), "output.weight": (64, 16)}
    block = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16)}
    block |= {"ffn_gate": (16, 16), "ffn_up": (16, 16), "ffn_down": (16, 16), "attn_norm": (16,), "ffn_norm": (16,)}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.full(shape, 0.01, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()

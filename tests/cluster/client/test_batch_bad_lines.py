"""Whatever is wrong with one line of a batch file touches no other, and nothing of it is asked again."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedCluster, scripted_cluster
from served_jobs import QUICK, answering, expected_text, sqlite_url

from isthmus.cluster.client import batch_lines
from isthmus.cluster.client.batch_lines import MAX_REQUEST_BYTES, BadLine, Line, read_lines
from isthmus.cluster.client.batch_output import BatchFiles, Paths
from isthmus.cluster.client.batch_run import PIECE_BYTES, BatchRun, Plan, Tally
from isthmus.cluster.client.jobs import JobsClient
from isthmus.cluster.frontend.gateway import MAX_MESSAGE_BYTES

GOOD = b'{"prompt": "good", "seed": 1, "max_tokens": 3}'
NESTED = b"[" * 100_000
DEEP = b'{"prompt": "p", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001
# What is wrong with a line, and how its reason begins.
BAD: list[tuple[bytes, str]] = [
    (b'{"prompt": "p", "custom_id": "\\ud83d"}', "has half a surrogate"),
    (b'{"prompt": "\\ud83d"}', "has half a surrogate"),
    (b'{"prompt": "p", "\\ud83d": 1}', "has half a surrogate"),
    (b'{"prompt": "p", "stop": ["\\udfff"]}', "has half a surrogate"),
    (NESTED, "nested too deeply"),
    (DEEP, "nested too deeply"),
    (b'{"prompt": "' + b"x" * 5_000_000 + b'"}', "a request of 50000"),
    (b"\xff\xfe", "not UTF-8 text (byte 0)"),
    (b'{"prompt": "\xed\xa0\xbd"}', "not UTF-8 text (byte 12)"),
    (b"\x00\x00\x00", "not JSON: "),
    (b'{"prompt": "p"}\x00', "not JSON: "),
    (b'{"prompt": "p", "temperature": 1e999}', "temperature: Input should be a finite number"),
    (b'{"prompt": "p", "temperature": NaN}', "temperature: Input should be a finite number"),
    (b'{"prompt": "p", "temperature": ' + b"9" * 5000 + b"}", "ValueError: Exceeds the limit"),
    (b'{"prompt": "p", "seed": ' + b"9" * 30 + b"}", "seed: Input should be less than"),
    (b'{"prompt": "p", "top_k": ' + b"9" * 30 + b"}", "top_k: Input should be less than"),
    (b'{"prompt": "p", "stop_token_ids": [-1, 99999999999]}', "stop_token_ids.0: Input should be greater"),
    (b'{"prompt": "p", "stop_token_ids": [' + b'"x",' * 99 + b'"x"]}', "stop_token_ids.0: "),
    (b'{"prompt": {"a": 1}}', "prompt: Input should be a valid string"),
    (b'{"prompt": ["a"]}', "prompt: Input should be a valid string"),
    (b'{"messages": "hi"}', "messages: Input should be a valid list"),
    (b'{"messages": [7, null]}', "messages.0: "),
    (b'{"messages": [{"role": "user"}]}', "messages.0.content: Field required"),
    (b'{"custom_id": 7, "prompt": "p"}', "custom_id: Input should be a valid string"),
    (b'{"custom_id": "b", "url": [1], "body": {"prompt": "p"}}', "url: Input should be"),
    (b'{"custom_id": "b", "body": null}', "body: Input should be a valid dictionary"),
    (b'{"custom_id": "twice", "prompt": "p"}', "custom_id 'twice' was used in line 1 already"),
    (b"{", "not JSON: "),
    (b"null", "not a JSON object"),
    (b'"' + b"a" * 10, "not JSON: "),
]
# What is unusual, and fine.
FINE: list[bytes] = [
    b'{"custom_id": "twice", "prompt": "good", "seed": 1, "max_tokens": 3}',
    b"\xef\xbb\xbf" + GOOD,
    GOOD + b"\r",
    b'{"prompt": "\\u0067ood", "seed": 1, "max_tokens": 3, "custom_id": "\\ud83d\\ude00"}',
    b"  \t" + GOOD + b"  ",
    b'{"prompt": "no", "prompt": "good", "seed": 1, "max_tokens": 3}',
    b'{"prompt": "good", "seed": 1, "max_tokens": 3, "user": {"any": [1e999]}}',
]
EMPTY = [b"", b"\r", b"  ", b"\xef\xbb\xbf"]


def mixed() -> list[tuple[bytes, str | None]]:
    """Fine and bad lines in turns, an empty one here and there; the last one is fine."""
    lines: list[tuple[bytes, str | None]] = [(line, "") for line in FINE]
    for number, (line, reason) in enumerate(BAD):
        lines += [(line, reason), (GOOD, "")]
        if number < len(EMPTY):
            lines.append((EMPTY[number], None))
    return lines


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def run(cluster: ScriptedCluster, source: Path, paths: Paths, *, finish: bool, ordered: bool) -> Tally:
    plan = Plan(model="bytes", instead="", priority="standard", tenant="", piece=4, under_way=3, ordered=ordered)
    async with JobsClient(cluster.gateway.address, patience_s=5) as client:
        with BatchFiles.open(paths, source, {}) as files:
            tally = await BatchRun(client, source, files, plan, lambda tally: None).run()
            if finish:
                files.finish()
    return tally


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_file_of_all_that_can_be_wrong_is_run_to_its_end(tmp_path: Path, ordered: bool) -> None:
    lines = mixed()
    source, paths = tmp_path / "in", Paths(output=tmp_path / "out")
    source.write_bytes(b"\n".join(line for line, _ in lines))  # the last one has no newline
    good = [number for number, (_, reason) in enumerate(lines, start=1) if reason == ""]
    bad = {number: reason for number, (_, reason) in enumerate(lines, start=1) if reason}
    async with scripted_cluster(answering(), jobs_db=sqlite_url(tmp_path), jobs=QUICK) as cluster:
        tally = await run(cluster, source, paths, finish=False, ordered=ordered)
        assert (tally.answered, tally.failed) == (len(good), len(bad))
        answers, errors = read(paths.output), read(paths.errors)
        assert sorted(answer["line"] for answer in answers) == good
        assert {answer["text"] for answer in answers} == {expected_text("good", 1, 3)}
        assert [error["line"] for error in errors] == list(bad)
        for error in errors:
            assert error["error"]["message"].startswith(bad[error["line"]])
            assert len(error["error"]["message"]) <= batch_lines.MAX_REASON
        assert errors[0]["custom_id"] == "\ud83d"
        written, asked = paths.output.read_bytes() + paths.errors.read_bytes(), len(cluster.decodes[0].requests)
        again = await run(cluster, source, paths, finish=True, ordered=ordered)
        assert (again.answered, again.failed) == (len(good) + len(bad), 0)
        assert paths.output.read_bytes() + paths.errors.read_bytes() == written
        assert len(cluster.decodes[0].requests) == asked


def test_the_largest_request_fits_into_a_message() -> None:
    assert PIECE_BYTES < MAX_REQUEST_BYTES < MAX_MESSAGE_BYTES - (32 << 10)


def test_a_line_that_is_too_long_to_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 100)
    source = tmp_path / "in"
    source.write_bytes(b"\n".join([GOOD, b"x" * 1000, GOOD, b"y" * 101, GOOD, b"z" * 505]))
    found = list(read_lines(source))
    assert [line.number for line in found] == [1, 2, 3, 4, 5, 6]
    assert [isinstance(line, Line) for line in found] == [True, False] * 3


def mutated(rng: random.Random) -> bytes:
    """A good line with some of its bytes, or pieces of its JSON, replaced."""
    line = bytearray(
        rng.choice([GOOD, *FINE, b'{"custom_id": "c", "body": {"messages": [{"role": "u", "content": "x"}]}}'])
    )
    pieces = [
        b"\\ud83d",
        b"\\u0000",
        b"1e999",
        b"NaN",
        b"-0",
        b"[" * 2000,
        b'{"a":' * 50,
        b"null",
        b'"',
        b"\xff",
        b"\xc3",
    ]
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(line))
        end = at + rng.choice([0, 1, 3, 8])
        new = rng.choice([rng.randbytes(rng.randrange(1, 6)), rng.choice(pieces), b"9" * rng.choice([10, 40, 5000])])
        line[at:end] = new
    return bytes(line).replace(b"\n", b" ")


def test_mutated_lines_touch_no_other(tmp_path: Path) -> None:
    """Every line that is not empty is told of, once, and the lines between them are all fine."""
    rng = random.Random(14)
    source, paths = tmp_path / "in", Paths(output=tmp_path / "out")
    for number in range(400):
        with source.open("ab") as file:
            file.write(mutated(rng) + b"\n" + GOOD.replace(b"good", b"good %d" % number) + b"\n")
    found = list(read_lines(source))
    between = [line for line in found if line.number % 2 == 0]
    assert [line.request.prompt for line in between if isinstance(line, Line)] == [f"good {n}" for n in range(400)]
    bad = [line for line in found if isinstance(line, BadLine)]
    assert len(bad) > 200
    with BatchFiles.open(paths, source, {}) as files:
        for line in bad:
            files.bad(line)
    with BatchFiles.open(paths, source, {}) as files:
        assert files.done == {line.number for line in bad}
    for line in found:
        if isinstance(line, Line):
            assert line.request.ByteSize() == len(line.request.SerializeToString())

"""Files of requests: what a line may be, and a run that goes on wherever it was stopped."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedCluster, scripted_cluster
from served_jobs import QUICK, answering, expected_text, sqlite_url

from isthmus.cluster.client.batch_lines import BadLine, Line, read_lines, read_requests
from isthmus.cluster.client.batch_output import BatchFiles, Paths
from isthmus.cluster.client.batch_run import BatchRun, Plan, Tally, check_lines
from isthmus.cluster.client.jobs import JobsClient
from isthmus.proto.errors import IllegalState, InvalidRequest

CHAT = {
    "custom_id": "c",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "bytes", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "seed": 4},
}


def lines_of(path: Path, *lines: Any) -> Path:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plan(**changes: Any) -> Plan:
    usual = {"model": "bytes", "instead": "", "priority": "standard", "tenant": "", "piece": 4, "under_way": 3}
    return Plan(**{**usual, "ordered": True, **changes})


async def run(cluster: ScriptedCluster, source: Path, output: Path, told: Any = None, **changes: Any) -> Tally:
    files = BatchFiles.open(Paths(output=output), source, {"piece": changes.get("piece", 4)})
    async with JobsClient(cluster.gateway.address, patience_s=5) as client:
        with files:
            tally = await BatchRun(client, source, files, plan(**changes), told or (lambda tally: None)).run()
            files.finish()
    return tally


def test_lines_of_both_formats(tmp_path: Path) -> None:
    completion = {"custom_id": "t", "url": "/v1/completions", "body": {"prompt": "p", "stop": "x", "user": "u"}}
    plain = {"prompt": "q", "temperature": 0, "top_k": 5}
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    source = lines_of(tmp_path / "in", CHAT, b"  ", completion, plain, parts)
    found = list(read_lines(source))
    assert all(isinstance(line, Line) for line in found)
    chat, text, short, pieces = (line for line in found if isinstance(line, Line))
    assert [(line.number, line.custom_id, line.kind) for line in (chat, text, short, pieces)] == [
        (1, "c", "chat"),
        (3, "t", "completion"),
        (4, None, "plain"),
        (5, None, "plain"),
    ]
    assert (chat.request.chat.messages[0].content, chat.request.model) == ("hi", "bytes")
    assert (chat.request.sampling.max_tokens, chat.request.sampling.seed) == (3, 4)
    assert not chat.request.sampling.HasField("temperature")
    assert (text.request.prompt, list(text.request.sampling.stop)) == ("p", ["x"])
    assert (short.request.sampling.temperature, short.request.sampling.top_k) == (0, 5)
    assert pieces.request.chat.messages[0].content == "ab"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: "),
        (b"[1]", "not a JSON object"),
        (b'{"prompt": "\xff"}', "not UTF-8 text"),
        ({"prompt": "p", "tools": []}, "tools: not supported"),
        ({"prompt": "p", "messages": []}, "has both messages and prompt"),
        ({}, "has no messages or prompt"),
        ({"prompt": 3}, "prompt: Input should be a valid string"),
        ({"prompt": "p", "n": 2}, "n: Input should be 1"),
        ({"body": {"prompt": "p"}}, "custom_id: Field required"),
        ({"custom_id": "x", "url": "/v1/embeddings", "body": {"prompt": "p"}}, "url: Input should be '/v1/chat/"),
        ({"custom_id": "x", "url": "/v1/completions", "body": CHAT["body"]}, "/v1/completions needs prompt"),
        (CHAT, "custom_id 'c' was used in line 1 already"),
    ],
)
def test_bad_lines(tmp_path: Path, line: Any, reason: str) -> None:
    source = lines_of(tmp_path / "in", CHAT, line)
    good, bad = read_lines(source)
    assert isinstance(good, Line)
    assert isinstance(bad, BadLine)
    assert bad.number == 2
    assert bad.reason.startswith(reason)
    with pytest.raises(InvalidRequest, match="line 2: "):
        read_requests(source)


def test_a_model_that_is_not_served(tmp_path: Path) -> None:
    source = lines_of(tmp_path / "in", CHAT, {"prompt": "p"})
    assert check_lines(source, "bytes", "") == 2
    assert check_lines(source, "other", "other") == 2
    wrong = "line 1 is for model 'bytes', and the cluster serves other; to run all lines on that: --model other"
    with pytest.raises(InvalidRequest, match=wrong):
        check_lines(source, "other", "")


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_run_answers_every_line_once(tmp_path: Path, ordered: bool) -> None:
    prompts = [{"prompt": f"prompt {number}", "seed": number, "max_tokens": 4} for number in range(30)]
    bad = [{"prompt": ""}, {"prompt": "p", "top_p": 7}]  # the gateway refuses these, and only these
    source = lines_of(tmp_path / "in", *prompts[:10], bad[0], b"no json", bad[1], *prompts[10:], CHAT)
    output = tmp_path / "out"
    async with scripted_cluster(answering(), jobs_db=sqlite_url(tmp_path), jobs=QUICK) as cluster:
        tally = await run(cluster, source, output, ordered=ordered)
        assert (tally.answered, tally.failed) == (31, 3)
        answers = read(output)
        lines = [answer["line"] for answer in answers]
        assert sorted(lines) == [*range(1, 11), *range(14, 35)]
        assert lines == sorted(lines) or not ordered
        texts = {answer["line"]: answer["text"] for answer in answers if "text" in answer}
        for number, line in enumerate([*range(1, 11), *range(14, 34)]):
            assert texts[line] == expected_text(f"prompt {number}", number, 4)
        (chat,) = (answer for answer in answers if "response" in answer)
        choice = chat["response"]["body"]["choices"][0]
        assert (chat["custom_id"], choice["finish_reason"]) == ("c", "length")
        assert choice["message"] == {"role": "assistant", "content": expected_text("<user>hi", 4, 3)}
        errors = {error["line"]: error["error"]["message"] for error in read(Paths(output=output).errors)}
        assert list(errors[11].split(";")) == ["the prompt is empty", " allowed: at least one character"]
        assert errors[12].startswith("not JSON")
        assert errors[13] == "top_p is 7; allowed: (0, 1]"
        assert not Paths(output=output).state.exists()
        with pytest.raises(IllegalState, match="is there already"):
            await run(cluster, source, output)


async def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    prompts = [{"prompt": f"prompt {number}", "max_tokens": 3, "seed": 1} for number in range(40)]
    source, output = lines_of(tmp_path / "in", *prompts, b"bad"), tmp_path / "out"
    async with scripted_cluster(answering(0.002), jobs_db=sqlite_url(tmp_path), jobs=QUICK) as cluster:
        for stop_after in (5, 17):
            enough = asyncio.Event()

            def told(tally: Tally, enough: asyncio.Event = enough, stop_after: int = stop_after) -> None:
                if tally.answered >= stop_after:
                    enough.set()

            running = asyncio.create_task(run(cluster, source, output, told))
            await asyncio.wait_for(enough.wait(), 20)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            with output.open("ab") as file:
                file.write(b'{"line": 3')  # as a crash in the middle of a write leaves it
            before = output.read_bytes()
        other = lines_of(tmp_path / "other", *prompts)
        with pytest.raises(IllegalState, match="was begun with another input: run it as before, or remove"):
            await run(cluster, other, output)
        tally = await run(cluster, source, output)
        assert (tally.answered, tally.failed) == (40, 1)
        answers = read(output)
        assert [answer["line"] for answer in answers] == list(range(1, 41))
        assert output.read_bytes().startswith(before.rpartition(b"\n")[0])
        asked = [bytes(request.prompt_token_ids).decode() for request in cluster.decodes[0].requests]
        assert sorted(asked) == sorted(prompt["prompt"] for prompt in prompts)  # no prompt lost or done twice


async def test_a_run_waits_where_there_is_no_room(tmp_path: Path) -> None:
    prompts = [{"prompt": f"prompt {number}", "max_tokens": 3} for number in range(12)]
    source, output = lines_of(tmp_path / "in", *prompts), tmp_path / "out"
    settings = {**QUICK, "max_jobs": 1}
    async with scripted_cluster(answering(), jobs_db=sqlite_url(tmp_path), jobs=settings) as cluster:
        assert (await run(cluster, source, output)).answered == 12

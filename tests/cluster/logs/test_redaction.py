"""Whatever is logged, no credentials are in it."""

import json
import logging
import random
import string
from typing import Any

import grpc.aio
import jwt
import pytest

from isthmus.cluster.access.keys import new_key
from isthmus.cluster.logs.configure import FORMATTERS, LogFormat, configure_logs
from isthmus.cluster.logs.redaction import INSTEAD, redacted

# As `new_key` makes them; the same in each process of a test run.
KEY = "isthmus_69b9eccf3dbe1979_dl0RBBpmeq6aHsh48g_n3BHCP6uyKPd96D_ui4wIy1Y"
SECRET = KEY[-43:]
TOKEN = jwt.encode({"sub": "alice"}, "s" * 32, algorithm="HS256")


@pytest.mark.parametrize("secret", [KEY, TOKEN, "s3cr3t.Opaque-token~value/+="])
@pytest.mark.parametrize(
    "text",
    [
        "authorization: Bearer SECRET",
        "Authorization: bearer SECRET",
        "AUTHORIZATION=Bearer SECRET",
        "authorization: SECRET",
        "proxy-authorization: Basic SECRET",
        "(('authorization', 'Bearer SECRET'), ('x', 'y'))",
        '("authorization", "Bearer SECRET")',
        "_Metadatum(key='authorization', value='Bearer SECRET')",
        "{'authorization': b'Bearer SECRET'}",
        '{"authorization": "Bearer SECRET"}',
        "Bearer SECRET",
        "refused: Bearer SECRET, and more",
    ],
)
def test_authorization_is_taken_out(text: str, secret: str) -> None:
    clean = redacted(text.replace("SECRET", secret))
    assert secret not in clean
    assert secret[-20:] not in clean
    assert INSTEAD in clean


@pytest.mark.parametrize("text", [f"key {KEY}", f"?key={KEY}&x=1", f"'{KEY}'", f"[{TOKEN}]", f"token={TOKEN}"])
def test_keys_and_tokens_are_taken_out_wherever_they_stand(text: str) -> None:
    clean = redacted(text)
    assert SECRET not in clean
    assert TOKEN.rpartition(".")[2] not in clean


@pytest.mark.parametrize(
    "text",
    [
        "request ended",
        "no gateway answers at 127.0.0.1:50051",
        "key 0123456789abcdef of tenant acme is revoked",
        "isthmus_queue_depth 3",
        "the bearer of a page",
        "model eyJ is no token",
        "authorization is needed",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_random_keys_in_random_lines() -> None:
    drawn = random.Random(5)
    for _ in range(200):
        key, _ = new_key("acme")
        before, after = ("".join(drawn.choices(string.punctuation + " abc", k=20)) for _ in range(2))
        clean = redacted(f"{before} {key} {after}")
        assert key[-43:] not in clean


@pytest.mark.parametrize("form", FORMATTERS)
def test_every_part_of_a_record_is_redacted(form: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("debug", form)
    log = logging.getLogger("isthmus.of.a.test")
    log.info("metadata %s", (("authorization", f"Bearer {KEY}"),))
    log.info(
        "fields", extra={"fields": {"nested": {"list": [f"Bearer {KEY}"]}, "authorization": KEY, "n": 3, "b": True}}
    )
    log.info("object", extra={"fields": {"metadata": grpc.aio.Metadata(("authorization", f"Bearer {KEY}"))}})
    try:
        raise ValueError(f"headers {{'authorization': 'Bearer {KEY}'}}")
    except ValueError:
        log.exception("a bug with %s", KEY)
    err = capsys.readouterr().err
    assert SECRET not in err
    assert "ValueError: headers" in err
    lines = err.splitlines()
    if form == "json":
        fields = json.loads(lines[1])
        assert (fields["n"], fields["b"], fields["authorization"]) == (3, True, INSTEAD)
        assert fields["nested"] == {"list": [f"Bearer {INSTEAD}"]}


def test_a_line_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    log = logging.getLogger("isthmus.of.a.test")
    log.info("two\nlines", extra={"fields": {"tenant": 'a"b\n', "level": "forged", "time": "forged"}})
    log.debug("not asked for")
    (line,) = capsys.readouterr().err.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert found["message"] == "two\nlines"
    assert (found["level"], found["tenant"], found["logger"]) == ("info", 'a"b\n', "isthmus.of.a.test")
    assert found["time"].startswith("20")


def test_a_line_of_text_is_one_line_that_nobody_forges(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "text")
    log = logging.getLogger("isthmus.of.a.test")
    log.info(
        "request ended", extra={"fields": {"tenant": "a\n2026 INFO forged x=1", "ms": 1.5, "codec": "raw", "why": ""}}
    )
    (line,) = capsys.readouterr().err.splitlines()
    _, level, name, rest = line.split(maxsplit=3)
    assert (level, name) == ("INFO", "isthmus.of.a.test")
    assert rest == 'request ended tenant="a\\n2026 INFO forged x=1" ms=1.5 codec=raw why=""'


def test_the_trace_of_a_bug_follows_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "text")
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("isthmus.of.a.test").exception("a bug")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("a bug")
    assert (lines[1], lines[-1]) == ("Traceback (most recent call last):", "KeyError: 'x'")


def test_a_line_that_cannot_be_made_is_told_and_hurts_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    log = logging.getLogger("isthmus.of.a.test")
    endless: dict[str, Any] = {"authorization": KEY}
    endless["again"] = endless

    class Broken:
        def __str__(self) -> str:
            raise ValueError(KEY)

    log.info("%d of %s", "no number", KEY)
    log.info("fields", extra={"fields": endless})
    log.info("object", extra={"fields": {"object": Broken()}})
    err = capsys.readouterr().err
    why = [json.loads(line)["message"].rpartition(" ")[2] for line in err.splitlines()]
    assert why == ["TypeError", "RecursionError", "ValueError"]
    assert SECRET not in err

"""Text, stop strings and the last event of one answer."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from scripted import served

from isthmus.cluster.requests.request import ResolvedRequest
from isthmus.cluster.requests.session import Session, new_session
from isthmus.proto.common_pb2 import (
    FINISH_REASON_EOS,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    TokenLogprobs,
    TransferStats,
)
from isthmus.proto.decode_pb2 import DecodeEvent
from isthmus.proto.generation_pb2 import GenerateEvent
from isthmus.proto.sampling import Sampling


def session(*stop: str, min_tokens: int = 0) -> Session:
    sampling = Sampling(stop=stop, min_tokens=min_tokens, seed=7)
    resolved = ResolvedRequest(
        request_id="r", call_id="r.1", prompt_token_ids=[1, 2, 3], sampling=sampling, codec="raw"
    )
    return new_session(resolved, served(), arrived_s=10.0)


def run(session: Session, text: str, *, size: int = 1) -> list[GenerateEvent]:
    """All events of a worker that says `text`, as far as the session wants them."""
    tokens = list(text.encode())
    made = []
    for start in range(0, len(tokens), size):
        if not session.finished:
            made.append(session.push(DecodeEvent(token_ids=tokens[start : start + size]), 10.5))
    if not session.finished:
        last = DecodeEvent(finish_reason=FINISH_REASON_LENGTH, transfer=TransferStats(frames=3))
        made.append(session.push(last, 11.0))
    return made


def text_of(events: Sequence[GenerateEvent]) -> str:
    return "".join(event.text for event in events)


def test_every_token_leaves_at_once_with_its_index() -> None:
    events = run(session(), "aé")
    assert [(event.text, list(event.token_ids), event.index) for event in events[:-1]] == [
        ("a", [97], 0),
        ("", [195], 1),
        ("é", [169], 2),
    ]


def test_the_last_event_sums_up() -> None:
    last = run(session(), "abc", size=2)[-1]
    assert (last.finish_reason, last.usage.prompt_tokens, last.usage.output_tokens) == (FINISH_REASON_LENGTH, 3, 3)
    assert last.timings.ttft_ms == pytest.approx(500)
    assert last.timings.total_ms == pytest.approx(1000)
    assert (last.timings.transfer.frames, last.timings.seed) == (3, 7)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_stop_string_ends_the_answer_before_it(size: int) -> None:
    events = run(session("END", "xyz"), "one two END three", size=size)
    assert text_of(events) == "one two "
    assert events[-1].finish_reason == FINISH_REASON_STOP
    assert events[-1].usage.output_tokens == len("one two END")
    assert sum(len(event.token_ids) for event in events) == len("one two END")


def test_what_only_began_like_a_stop_string_comes_after_all() -> None:
    events = run(session("END"), "THE EN")
    assert text_of(events) == "THE EN"
    assert events[-1].finish_reason == FINISH_REASON_LENGTH


def test_stop_strings_wait_for_min_tokens() -> None:
    assert text_of(run(session("b", min_tokens=4), "abcdabcd")) == "abcda"


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    answer = session()
    answer.push(DecodeEvent(token_ids=[0xE2, 0x82]), 10.5)
    last = answer.push(DecodeEvent(finish_reason=FINISH_REASON_EOS), 11.0)
    assert last.text == "\N{REPLACEMENT CHARACTER}"


def test_logprobs_are_those_of_the_tokens_that_count() -> None:
    answer = session("b")
    logprobs = [TokenLogprobs(logprob=-value) for value in (1, 2, 3)]
    event = answer.push(DecodeEvent(token_ids=b"abc", logprobs=logprobs), 10.5)
    assert [entry.logprob for entry in event.logprobs] == [-1, -2]


def test_the_last_event_tells_which_stop_string_ended_the_output() -> None:
    events = run(session("EN", "END", "never"), "one END two")
    assert [event.stop_text for event in events] == [""] * (len(events) - 1) + ["EN"]
    assert (events[-1].finish_reason, text_of(events)) == (FINISH_REASON_STOP, "one ")
    assert run(session("never"), "one")[-1].stop_text == ""


def test_a_stop_token_has_no_text() -> None:
    last = session("END").push(DecodeEvent(token_ids=[65], finish_reason=FINISH_REASON_STOP), 10.5)
    assert (last.finish_reason, last.stop_text) == (FINISH_REASON_STOP, "")


def test_the_prompt_is_told_once_and_only_where_asked_for() -> None:
    asks = session()
    asks.request = replace(asks.request, return_prompt_token_ids=True)
    assert [list(event.prompt_token_ids) for event in run(asks, "ab")] == [[1, 2, 3], [], []]
    assert not any(event.prompt_token_ids for event in run(session(), "ab"))


def test_log_probabilities_of_the_prompt_come_once_whatever_is_lost() -> None:
    asks = session()
    all_of_them = [TokenLogprobs(logprob=-float(number)) for number in range(5)]

    def push(*numbers: int) -> list[float]:
        event = asks.push(DecodeEvent(prompt_logprobs=[all_of_them[number] for number in numbers]), 10.5)
        return [-token.logprob for token in event.prompt_logprobs]

    asks.begin_attempt()
    assert [push(0, 1), push(2)] == [[0, 1], [2]]
    asks.begin_attempt()  # it is computed once more, in other pieces
    assert [push(0), push(1, 2, 3), push(4)] == [[], [3], [4]]
    asks.begin_attempt()
    assert push(0, 1, 2, 3, 4) == []

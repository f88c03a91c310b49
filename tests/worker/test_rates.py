"""Factors are found again from measurements that were made with them."""

import random

import pytest

from isthmus.proto.worker_pb2 import WorkerReport
from isthmus.worker.rates import GUESSED_TOKENS_PER_S, LINK_BYTES, LinearTime, Rates


def test_the_factors_come_back() -> None:
    draw, rates = random.Random(1), Rates()
    for _ in range(200):
        start, tokens = draw.randrange(0, 8192, 64), draw.randrange(64, 1024)
        ms = 3 + 0.5 * tokens + 0.02 * tokens * (start + tokens / 2) / 1e3
        rates.add_prefill([(start, start + tokens)], ms / 1e3 * draw.uniform(0.95, 1.05))
        batch, pages = draw.randrange(1, 64), draw.randrange(1, 4000)
        rates.add_step(batch, pages, (8 + 0.2 * batch + 0.01 * pages) / 1e3)
    report = WorkerReport()
    rates.fill_report(report)
    assert report.prefill_rate.ms_per_token == pytest.approx(0.5, rel=0.1)
    assert report.prefill_rate.ms_per_token_ktoken == pytest.approx(0.02, rel=0.1)
    assert report.step_rate.ms == pytest.approx(8, rel=0.05)
    assert report.step_rate.ms_per_page == pytest.approx(0.01, rel=0.05)


def test_recent_measurements_count_most() -> None:
    time = LinearTime(1)
    for ms in [10.0] * 500 + [20.0] * 500:
        time.add([1.0], ms)
    assert time.factors() == (pytest.approx(20, rel=0.01),)


def test_how_fast_prompts_were_computed_lately() -> None:
    rates = Rates()
    assert rates.tokens_per_s == GUESSED_TOKENS_PER_S
    for seconds in [1.0] * 50 + [4.0] * 3:
        rates.add_prefill([(0, 300), (64, 164)], seconds)
    assert rates.tokens_per_s == pytest.approx(100 + 300 * 0.8**3, rel=0.01)


def test_nothing_saves_time() -> None:
    time = LinearTime(2)
    for quantity in range(1, 20):
        time.add([1.0, quantity], 100 - quantity)
    factors = time.factors()
    assert factors is not None
    assert factors[1] == 0
    assert 80 < factors[0] < 100


def test_nothing_is_told_before_it_is_measured() -> None:
    rates, report = Rates(), WorkerReport()
    rates.add_step(1, 1, 0.01)
    rates.add_transfer("a:1", LINK_BYTES - 1, 0.001)
    rates.fill_report(report)
    assert not report.HasField("step_rate")
    assert not report.link_bytes_per_ms
    rates.add_transfer("a:1", 10 * LINK_BYTES, 0.01)
    rates.fill_report(report)
    assert report.link_bytes_per_ms["a:1"] == pytest.approx(LINK_BYTES)

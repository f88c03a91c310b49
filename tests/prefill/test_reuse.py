"""What is cached is not computed, whatever place it is in, and what arrives is what computing it would have sent."""

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from models import model_path
from receiving import Received, Receiving, prefill_worker

from isthmus.kvtransfer.encoded import PageFormat
from isthmus.prefill.config import PrefillConfig

PAGE = 64
CODECS = ["raw", "tq-k4v4"]


def make_prompt(tokens: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + position * 31) % 500 for position in range(tokens)]


PROMPT = make_prompt(700)


async def once(prompt: list[int], codec: str, **settings) -> Received:
    """What a worker with nothing cached sends."""
    async with prefill_worker(model_path("tiny-llama"), **settings) as fresh:
        return await fresh.receive(fresh.request(prompt, codec=codec))


def assert_same(got: Received, expected: Received, *, codec: str = "raw") -> None:
    """Equal but for rounding: batches of other sizes add in another order, and a code may tip over."""
    assert got.first_token == expected.first_token
    if codec == "raw":
        torch.testing.assert_close(got.kv, expected.kv, rtol=1e-4, atol=1e-4)
    else:
        error = (got.kv - expected.kv).pow(2).mean() / expected.kv.pow(2).mean()
        assert error < 1e-4


async def cached_in(worker: Receiving, *, dense: bool) -> None:
    """Drops what the pool caches where `dense` is False, so that only encoded pages are left."""
    table, done = worker.worker._prefixes.table, threading.Event()

    def evict() -> None:
        table.release(table.take(table.free) or [])
        assert not table.cached
        done.set()

    if not dense:
        worker.worker._engine.thread.post(evict)
        assert await asyncio.to_thread(done.wait, 10)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dense", [True, False])
async def test_the_same_prompt_again_is_a_transfer(codec, dense):
    async with prefill_worker(model_path("tiny-llama")) as worker:
        first = await worker.receive(worker.request(PROMPT, codec=codec))
        assert (first.reused, worker.computed()) == ((0, 0), 700)
        await cached_in(worker, dense=dense)
        again = await worker.receive(worker.request(PROMPT, codec=codec))
        assert (again.reused, worker.computed()) == ((640, 0), 760)
        assert again.wire(0, 640) == first.wire(0, 640)
        if dense or codec == "raw":
            assert_same(again, first, codec=codec)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 192])
@pytest.mark.parametrize("codec", CODECS)
async def test_the_last_token_is_always_computed(tokens, codec):
    prompt = make_prompt(tokens)
    async with prefill_worker(model_path("tiny-llama")) as worker:
        first = await worker.receive(worker.request(prompt, codec=codec))
        again = await worker.receive(worker.request(prompt, codec=codec))
        assert again.reused == ((tokens - 1) // PAGE * PAGE, 0)
        assert_same(again, first, codec=codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dense", [True, False])
async def test_turns_of_a_chat_compute_only_what_is_new(codec, dense):
    """Each turn makes the newest page of the one before an old one, which leaves packed now."""
    turns = [make_prompt(tokens) for tokens in (200, 330, 460, 700)]
    async with prefill_worker(model_path("tiny-llama")) as worker:
        computed = 0
        for turn, before in zip(turns, [[], *turns], strict=False):
            await cached_in(worker, dense=dense)
            got = await worker.receive(worker.request(turn, codec=codec))
            shared = len(before) // PAGE * PAGE
            assert got.reused == (shared, 0)
            computed += len(turn) - shared
            assert worker.computed() == computed
            if dense or codec == "raw":
                assert_same(got, await once(turn, codec), codec=codec)
            else:
                assert not got.kv.isnan().any()


@pytest.mark.parametrize("dense", [True, False])
async def test_a_shorter_prompt_never_gets_a_packed_page_as_its_newest(dense):
    """Its newest full page was packed in the longer one: packed again from what was computed, or computed again."""
    short = PROMPT[:400]  # 6 full pages
    async with prefill_worker(model_path("tiny-llama")) as worker:
        await worker.receive(worker.request(PROMPT, codec="tq-k4v4"))
        await cached_in(worker, dense=dense)
        got = await worker.receive(worker.request(short, codec="tq-k4v4"))
        assert got.reused == ((384, 0) if dense else (320, 0))
        if dense:
            assert_same(got, await once(short, "tq-k4v4"), codec="tq-k4v4")


@pytest.mark.parametrize("codec", CODECS)
async def test_pages_that_the_receiver_holds_are_neither_sent_nor_computed(codec):
    async with prefill_worker(model_path("tiny-llama")) as worker:
        first = await worker.receive(worker.request(PROMPT, codec=codec))
        held = await worker.receive(worker.request(PROMPT, codec=codec, held_pages=5))
        assert held.kv[:, :, :320].isnan().all()
        torch.testing.assert_close(held.kv[:, :, 320:640], first.kv[:, :, 320:640])
        assert (held.stats.held_tokens, held.reused) == (320, (320, 0))
        assert held.first_token == first.first_token
        assert worker.computed() == 760
        await cached_in(worker, dense=False)
        held = await worker.receive(worker.request(PROMPT, codec=codec, held_pages=10))
        assert worker.computed() == 820, "held and cached here: decoded, not computed"
        assert held.reused == (0, 0)


async def test_held_pages_that_are_not_here_are_computed_and_not_sent():
    async with prefill_worker(model_path("tiny-llama")) as worker:
        held = await worker.receive(worker.request(PROMPT, codec="tq-k4v4", held_pages=5))
        assert worker.computed() == 700
        assert {start for _, start in held.encoded} == {320, 512, 576, 640}
        all_of_it = await worker.receive(worker.request(PROMPT, codec="tq-k4v4"))
        assert all_of_it.reused == (640, 0), "encoded now from what was computed then"
        assert_same(all_of_it, await once(PROMPT, "tq-k4v4"), codec="tq-k4v4")


@pytest.mark.parametrize("codec", CODECS)
async def test_what_was_decoded_once_is_not_decoded_again(codec, monkeypatch):
    decoded = []
    decode = PageFormat.decode

    def counted(form, layer, pages, device):
        decoded.extend(pages)
        return decode(form, layer, pages, device)

    monkeypatch.setattr(PageFormat, "decode", counted)
    async with prefill_worker(model_path("tiny-llama")) as worker:
        await worker.receive(worker.request(PROMPT, codec=codec))
        await cached_in(worker, dense=False)
        one = await worker.receive(worker.request(PROMPT, codec=codec))
        assert len(decoded) == 10 * 3
        other = await worker.receive(worker.request(PROMPT, codec=codec))
        assert len(decoded) == 10 * 3
        assert other.reused == (640, 0)
        assert_same(other, one, codec=codec)


async def test_tenants_and_codecs_share_nothing():
    async with prefill_worker(model_path("tiny-llama")) as worker:
        for fields in ({"tenant": "a"}, {"tenant": "b"}, {"codec": "fp8"}, {}):
            assert (await worker.receive(worker.request(PROMPT, **fields))).reused == (0, 0)
        assert (await worker.receive(worker.request(PROMPT, tenant="a"))).reused == (640, 0)


async def test_sliding_windows_are_reused_too():
    async with prefill_worker(model_path("tiny-gemma3")) as worker:
        first = await worker.receive(worker.request(PROMPT))
        for dense in (True, False):
            await cached_in(worker, dense=dense)
            again = await worker.receive(worker.request(PROMPT))
            assert again.reused == (640, 0)
            assert_same(again, first)


async def test_a_pool_of_one_prompt_evicts_for_the_next():
    async with prefill_worker(model_path("tiny-llama"), pool_tokens=704, host_cache_gib=0) as worker:
        for seed in (1, 2, 1):
            prompt = make_prompt(700, seed)
            assert_same(await worker.receive(worker.request(prompt)), await once(prompt, "raw"))
        assert worker.computed() == 2100
        assert worker.worker.server.report().counters["host_cache_bytes"] == 0


def store_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "tenant")]


@pytest.mark.parametrize("codec", CODECS)
async def test_the_store_survives_a_restart(codec, tmp_path):
    first = await once(PROMPT, codec, store_dir=str(tmp_path))
    assert len(store_files(tmp_path)) == 10
    async with prefill_worker(model_path("tiny-llama"), store_dir=str(tmp_path)) as worker:
        again = await worker.receive(worker.request(PROMPT, codec=codec))
        assert (again.reused, worker.computed()) == ((0, 640), 60)
        assert again.wire(0, 640) == first.wire(0, 640)
        if codec == "raw":
            assert_same(again, first)
        third = await worker.receive(worker.request(PROMPT, codec=codec))
        assert third.reused == (640, 0), "in the host cache by now"
        assert worker.worker.server.report().counters["store_hits"] == 10


async def test_a_damaged_file_ends_the_prefix_there(tmp_path):
    first = await once(PROMPT, "raw", store_dir=str(tmp_path))
    async with prefill_worker(model_path("tiny-llama"), store_dir=str(tmp_path)) as worker:
        salted = worker.worker._job(worker.request(PROMPT), None).prompt.page_hash(4).hex()
        (path,) = [path for path in store_files(tmp_path) if path.name.startswith(salted)]
        path.write_bytes(path.read_bytes()[:-1])
        got = await worker.receive(worker.request(PROMPT))
        assert (got.reused, worker.computed()) == ((0, 256), 444)
        assert_same(got, first)
        assert worker.worker.server.report().counters["store_corrupt"] == 1


async def test_a_store_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("isthmus.prefill.prefix._FETCH_S", 0.05)
    monkeypatch.setattr(
        "isthmus.kvtransfer.storage.store.PageStore.read", lambda self, form, key, tenant: time.sleep(0.5)
    )
    async with prefill_worker(model_path("tiny-llama"), store_dir=str(tmp_path)) as worker:
        assert (await worker.receive(worker.request(PROMPT))).reused == (0, 0)
        assert worker.worker.server.report().counters["store_timeouts"] == 1


async def test_a_store_in_a_folder_that_cannot_be_written_changes_nothing(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    got = await once(PROMPT, "raw", store_dir=os.fspath(blocked))
    assert_same(got, await once(PROMPT, "raw"))


def test_the_store_is_off_by_default():
    assert PrefillConfig(model="m").store_dir is None

"""The page at / in Chromium: what somebody who types there sees, and what the gateway is left with."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from browser.driven import Page, chromium
from http_door import http_client, http_cluster
from keyed import Keys
from scripted import hangs, says
from served_http import served_http

from isthmus.cluster.access.settings import AccessSettings
from isthmus.proto.common_pb2 import FINISH_REASON_LENGTH
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest

pytestmark = pytest.mark.skipif(
    "ISTHMUS_TEST_CHROMIUM" not in os.environ, reason="takes Chromium, its driver and Selenium: make test-browser"
)

ENTER, SHIFT, ESCAPE, TAB = "\ue007", "\ue008", "\ue00c", "\ue004"  # as WebDriver has them
ANSWER = "article.assistant .text"
MARKUP = '<img src="x" onerror="document.title=1"><script>document.title=2</script> & "quoted" \\ 🌍\n\nnext'


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
async def page(driver: Any) -> AsyncIterator[Page]:
    page = Page(driver)
    await page.complaints()
    yield page
    assert await page.complaints() == []


async def test_a_small_model_answers_with_its_timings(page: Page) -> None:
    async with served_http() as (gateway, _):
        await page.open(gateway.http_url)
        await page.until("document.getElementById('model').textContent !== '…'")
        async with http_client(gateway.http_url) as client:
            assert await page.text("#model") == (await client.get("/v1/models")).json()["data"][0]["id"]
        await page.run("document.getElementById('most').value = 40")
        await page.press("Why is the sky", SHIFT, ENTER, SHIFT, "blue?", ENTER)
        await page.until_idle()
        assert await page.text("article.user .text") == "Why is the sky\nblue?"
        assert await page.text(ANSWER) != ""
        rows = await page.timings()
        browser_ms, gateway_ms = (float(value.removesuffix(" ms")) for value in rows["TTFT"])
        assert 0 < gateway_ms <= browser_ms
        assert all(float(value.removesuffix(" ms")) > gateway_ms for value in rows["total"])
        assert all(float(value) > 1 for value in rows["tokens/s after the first"])
        assert 1 < int(rows["output tokens"][1]) <= 40
        assert rows["seed"][1].isdecimal()
        assert {"prefill", "prefill worker", "decode worker", "KV pages sent"} <= set(rows)
        # The next turn has the first one before it.
        prompt_tokens = int(rows["prompt tokens"][1].split(",")[0])
        await page.press("And at night?", ENTER)
        await page.until("document.querySelectorAll('article.assistant table').length === 2")
        await page.until_idle()
        assert int((await page.timings())["prompt tokens"][1].split(",")[0]) > prompt_tokens
        assert await page.text("#problem") == ""


async def test_text_streams_in_and_is_no_markup(page: Page) -> None:
    go_on = asyncio.Event()

    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        tokens = list(MARKUP.encode())
        for token in tokens[:40]:
            await context.write(DecodeEvent(token_ids=[token]))
        await go_on.wait()
        await context.write(DecodeEvent(token_ids=tokens[40:]))
        await context.write(DecodeEvent(finish_reason=FINISH_REASON_LENGTH))

    async with http_cluster(script) as (cluster, _):
        await page.open(cluster.gateway.http_url)
        await page.press("hi", ENTER)
        await page.until("document.querySelector(arguments[0])?.textContent === arguments[1]", ANSWER, MARKUP[:40])
        assert await page.text("#said") == "Answering…"
        assert await page.run("return document.getElementById('send').disabled")
        go_on.set()
        await page.until_idle()
        assert await page.text(ANSWER) == MARKUP
        assert await page.run("return document.querySelectorAll('img, main script').length") == 0
        assert await page.run("return document.title") == "isthmus"
        assert (await page.timings())["output tokens"] == ["", str(len(MARKUP.encode()))]


async def test_a_wrong_key_is_told_and_a_right_one_kept(page: Page, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    key = keys.add("acme", requests_per_min=1)
    async with http_cluster(says("hello"), access=AccessSettings(keys_file=str(keys.path))) as (cluster, _):
        await page.open(cluster.gateway.http_url)
        await page.until("!document.getElementById('problem').hidden")  # asked without one
        assert await page.run("return document.activeElement.id") == "key"
        unasked = await page.text("#problem")
        await page.press("wrong", TAB)
        await page.until("document.getElementById('problem').textContent !== arguments[0]", unasked)
        for told in (unasked, await page.text("#problem")):
            assert told.startswith("401: ") and "Enter a valid key" in told and "(request " in told
        await page.run("document.getElementById('key').value = ''")
        await page.press(key, TAB)
        await page.until("document.getElementById('problem').hidden")
        await page.open(cluster.gateway.http_url)  # the tab still has it
        await page.until("document.getElementById('model').textContent === 'bytes'")
        assert await page.run("return {...sessionStorage}") == {"isthmus-key": key}
        assert await page.run("return localStorage.length + document.cookie.length") == 0
        await page.press("hi", ENTER)
        await page.until_idle()
        assert await page.text(ANSWER) == "hello"
        await page.press("once more", ENTER)
        await page.until("document.getElementById('problem').textContent.startsWith('429: ')")
        assert "Try again in " in await page.text("#problem")
        # What was not answered is there to be sent again.
        assert await page.run("return document.getElementById('prompt').value") == "once more"
        assert await page.run("return document.querySelectorAll('article').length") == 2


@pytest.mark.parametrize("how", ["click", "key"])
async def test_stop_frees_the_request(page: Page, how: str) -> None:
    async with http_cluster(hangs) as (cluster, _):
        await page.open(cluster.gateway.http_url)
        await page.press("hi", ENTER)
        await page.until("document.querySelector(arguments[0])?.textContent === 'A'", ANSWER)
        assert cluster.decodes[0].cancelled == 0
        await (page.click("#stop") if how == "click" else page.press(ESCAPE))
        async with asyncio.timeout(5):
            await cluster.gateway.load.wait_idle()
            while not cluster.decodes[0].cancelled:
                await asyncio.sleep(0.01)
        await page.until_idle()
        assert await page.text("#said") == "Stopped."
        assert await page.text("#problem") == ""
        rows = await page.timings()
        assert (rows["finish"], rows["output tokens"]) == (["", "stopped"], ["", "1"])
        assert await page.run("return document.activeElement.id") == "prompt"
        await page.click("#new")
        assert await page.run("return document.querySelectorAll('article').length") == 0


async def test_an_error_amid_the_answer_is_told(page: Page) -> None:
    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await context.write(DecodeEvent(token_ids=list(b"half")))
        raise ValueError("secret")

    async with http_cluster(script, replays=0) as (cluster, _):
        await page.open(cluster.gateway.http_url)
        await page.press("hi", ENTER)
        await page.until("!document.getElementById('problem').hidden")
        await page.until_idle()
        assert "The answer is not whole" in await page.text("#problem")
        assert await page.text(ANSWER) == "half"


async def test_a_phone_has_room_for_it_and_the_dark_is_dark(page: Page) -> None:
    async with http_cluster(says("word " * 150)) as (cluster, _):
        metrics = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
        await page.command("Emulation.setDeviceMetricsOverride", **metrics)
        try:
            await page.open(cluster.gateway.http_url)
            await page.press("x" * 200, ENTER)
            await page.until_idle()
            wide = "return [document.documentElement, document.getElementById('chat')].map((e) => e.scrollWidth)"
            assert max(await page.run(wide)) <= 360
            shown = "return document.getElementById('send').getBoundingClientRect().bottom"
            assert await page.run(shown) <= 640
            colour = "return getComputedStyle(document.body).backgroundColor"
            for scheme, expected in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")):
                media = [{"name": "prefers-color-scheme", "value": scheme}]
                await page.command("Emulation.setEmulatedMedia", features=media)
                assert await page.run(colour) == expected
        finally:
            await page.command("Emulation.clearDeviceMetricsOverride")
            await page.command("Emulation.setEmulatedMedia", features=[])

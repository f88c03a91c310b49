"""A browser with the page in it, driven from the event loop that serves the page."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WAIT_S = 20.0
_LEVELS = ("WARNING", "SEVERE")  # of what the console has: violations of the policy are severe


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium without a window, as a WebDriver of Selenium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = os.environ["ISTHMUS_TEST_CHROMIUM"]
    arguments = ["--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--no-proxy-server"]
    if os.geteuid() == 0:  # Chromium's sandbox refuses root
        arguments.append("--no-sandbox")
    for argument in arguments:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(os.environ["ISTHMUS_TEST_CHROMEDRIVER"]))
    try:
        driver.set_script_timeout(WAIT_S)
        yield driver
    finally:
        driver.quit()


class Page:
    """The page of one gateway. Elements are named by CSS selectors."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    async def open(self, url: str | None) -> None:
        assert url is not None, "the gateway has no HTTP port"
        await asyncio.to_thread(self._driver.get, f"{url}/")

    async def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in JavaScript returns."""
        return await asyncio.to_thread(self._driver.execute_script, script, *arguments)

    async def command(self, name: str, **parameters: Any) -> None:
        """One of the DevTools protocol."""
        await asyncio.to_thread(self._driver.execute_cdp_cmd, name, parameters)

    async def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus."""
        await asyncio.to_thread(lambda: self._driver.switch_to.active_element.send_keys(*keys))

    async def click(self, selector: str) -> None:
        await asyncio.to_thread(lambda: self._driver.find_element("css selector", selector).click())

    async def text(self, selector: str) -> str:
        """Of all elements that match, a line each; as the DOM has it, with its blanks."""
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent).join('\\n')"
        return await self.run(script, selector)

    async def until(self, condition: str, *arguments: Any) -> None:
        """Waits until an expression in JavaScript is true."""
        try:
            async with asyncio.timeout(WAIT_S):
                while not await self.run(f"return Boolean({condition})", *arguments):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"never: {condition}\n{await self.run('return document.body.innerText')}") from None

    async def until_idle(self) -> None:
        """Waits until no turn is being answered."""
        await self.until("document.getElementById('stop').disabled")

    async def timings(self) -> dict[str, list[str]]:
        """The rows of the table of the last turn: [browser, gateway] by their titles."""
        script = """return [...document.querySelectorAll("article:last-child tbody tr")]
            .map((row) => [...row.cells].map((cell) => cell.textContent))"""
        return {title: values for title, *values in await self.run(script)}

    async def complaints(self) -> list[str]:
        """What the console has, since the last call; failed requests, which the page tells itself, left out."""
        told = await asyncio.to_thread(self._driver.get_log, "browser")
        return [each["message"] for each in told if each["source"] != "network" and each["level"] in _LEVELS]

"""The page at /: who gets it, what a browser may do for it, and that it needs nothing from elsewhere."""

import base64
import hashlib
import re
from pathlib import Path

from http_door import http_cluster
from keyed import Keys
from scripted import says

from isthmus.cluster.access.settings import AccessSettings
from isthmus.cluster.http.page import route


async def test_the_page_is_open_and_what_it_asks_for_is_not(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    key = keys.add("acme")
    async with http_cluster(says("hello"), access=AccessSettings(keys_file=str(keys.path))) as (_, client):
        page = await client.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert (await client.head("/")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/page.html")).status_code == 401
        own = {"authorization": f"Bearer {key}"}
        assert (await client.get("/v1/models", headers=own)).status_code == 200
        assert (await client.post("/", headers=own)).status_code == 405
        assert "/" not in (await client.get("/openapi.json", headers=own)).json()["paths"]


async def test_a_browser_may_run_its_own_script_and_nothing_else() -> None:
    async with http_cluster(says("hello")) as (_, client):
        page = await client.get("/")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert (policy["connect-src"], policy["img-src"]) == ("'self'", "data:")
    assert policy["require-trusted-types-for"] == "'script'"
    for tag in ("script", "style"):
        start, end = page.text.index(f"<{tag}>") + len(tag) + 2, page.text.index(f"</{tag}>")
        digest = hashlib.sha256(page.text[start:end].encode()).digest()
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
        assert page.text.count(f"<{tag}") == 1
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["referrer-policy"] == "no-referrer"


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = Path(route.__file__).with_name("page.html").read_text()
    assert re.findall(r"[a-z]+://|\burl\(|@import|\bimport\(|\bsrc=", text) == []
    assert re.findall(r'href="([^"]*)"', text) == ["data:,"]
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=|\sstyle=", text) == []
    assert set(re.findall(r'"(/[^"]*)"', text)) == {"/v1/models", "/v1/chat/completions"}


async def test_the_page_can_be_switched_off() -> None:
    async with http_cluster(says("hello"), http={"page": False}) as (_, client):
        assert (await client.get("/")).status_code == 404
        assert (await client.get("/v1/models")).status_code == 200

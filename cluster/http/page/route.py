"""`GET /`: a page to try the cluster in a browser. It is one file that holds nothing secret and loads nothing else."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

from ..call import Call
from ..door import Endpoint

_FILE = Path(__file__).with_name("page.html")


def page_endpoints() -> tuple[Endpoint, ...]:
    """The page, read once. It is open, as a browser that follows a link shows no key; what it asks for is not."""
    text = _FILE.read_text(encoding="utf-8")
    headers = _headers(text)

    async def show(call: Call) -> Response:
        return Response(text, media_type="text/html", headers=headers)

    return (Endpoint(method="GET", path="/", summary="A page to try it.", handle=show, open=True, documented=False),)


def _headers(text: str) -> dict[str, str]:
    """What a browser may do for the page: run its own script, apply its own style, ask its own server."""
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of("script", text),
        "style-src": _hash_of("style", text),
        "connect-src": "'self'",
        "img-src": "data:",  # its icon, which is empty: a browser would ask for /favicon.ico
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # no text becomes markup, whatever the script does
        "trusted-types": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "cache-control": "no-cache",
    }


def _hash_of(tag: str, text: str) -> str:
    """Of the page's one element of this kind, as a policy names it."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    return f"'sha256-{digest}'"

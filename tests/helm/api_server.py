"""As much of an API server as Helm asks when a template looks something up: which kinds there are, and objects."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from .charts import NAMESPACE, RELEASE, Object, rendered

VERSION = {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}


@contextmanager
def serving(objects: list[Object], others: Iterable[Object] = ()) -> Iterator[str]:
    """The URL of a server that has these objects, of kinds that the chart looks up; of `others` it knows the kinds."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(objects, others))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answers(objects: list[Object], others: Iterable[Object]) -> dict[str, Any]:
    kinds = {(each["apiVersion"], each["kind"]) for each in [*rendered(), *objects, *others]}
    groups = sorted({version for version, _ in kinds if "/" in version})
    answers: dict[str, Any] = {
        "/version": VERSION,
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "groups": [_group(*version.split("/")) for version in groups]},
    }
    for version in ("v1", *groups):
        resources = [_resource(kind) for of, kind in sorted(kinds) if of == version]
        answers[_folder(version)] = {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
    for each in objects:
        owner = {"meta.helm.sh/release-name": RELEASE, "meta.helm.sh/release-namespace": NAMESPACE}
        notes = {**each["metadata"].get("annotations", {}), **owner}  # as Helm installed it
        each = {**each, "metadata": {**each["metadata"], "annotations": notes}}
        path = f"namespaces/{NAMESPACE}/{_plural(each['kind'])}/{each['metadata']['name']}"
        answers[f"{_folder(each['apiVersion'])}/{path}"] = each
    return answers


def _folder(version: str) -> str:
    return f"/{'apis' if '/' in version else 'api'}/{version}"


def _group(name: str, version: str) -> Object:
    found = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [found], "preferredVersion": found}


def _resource(kind: str) -> Object:
    return {"name": _plural(kind), "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get", "list"]}


def _plural(kind: str) -> str:
    name = kind.lower()
    return f"{name.removesuffix('y')}ies" if name.endswith("y") else f"{name}s"


def _handler(objects: list[Object], others: Iterable[Object]) -> type[BaseHTTPRequestHandler]:
    answers = _answers(objects, others)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path.partition("?")[0].rstrip("/"))
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(found or missing).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler

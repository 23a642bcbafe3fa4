"""A stand-in for the service of Weights & Biases, on this machine."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

#: a key in the form of one.
KEY = "0123456789abcdef" * 3


class Server:
    """A stand-in for the service, on this machine.

    Args:
        fails: what the answer to a request is instead of the right one, by the beginning of its
            path: a status code, a text, or None for no answer at all.

    Attributes:
        address: its address.
        streams: what was sent of a run's files, by their names.
        uploads: whole files, by their names.
        exit_code: of the run that ended.
        runs: names of runs that began.
        views: views and reports that were saved, by their ids.
    """

    def __init__(self, fails: Mapping[str, int | str | None]) -> None:
        self.fails, self.done = fails, threading.Event()
        self.streams: dict[str, list[str]] = {}
        self.uploads: dict[str, str] = {}
        self.exit_code: int | None = None
        self.runs: list[str] = []
        self.views: dict[str, dict[str, Any]] = {}
        self.address = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            do_GET = do_PUT = do_POST  # noqa: N815 - the names are http.server's

            def log_message(self, *_: Any) -> None:
                pass

        found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        found.daemon_threads = True
        self.address = f"http://127.0.0.1:{found.server_port}"
        threading.Thread(target=found.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.done.set()
            found.shutdown()
            found.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path, content = request.path, b"{}"
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status = next((s for start, s in self.fails.items() if path.startswith(start)), 200)
        if status is None:
            self.done.wait(30)
            return
        if path == "/graphql":
            content = json.dumps({"data": self.data(json.loads(body))}).encode()
        elif path.startswith("/upload/"):
            self.uploads[path.removeprefix("/upload/")] = body.decode()
        elif path.endswith("/file_stream"):
            sent = json.loads(body)
            for name, part in sent.get("files", {}).items():
                self.streams.setdefault(name, []).extend(part["content"])
            self.exit_code = sent.get("exitcode", self.exit_code)
        if isinstance(status, str):
            status, content = 200, status.encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def data(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return what the service would say, as far as its client reads it."""
        query, values = asked["query"], asked.get("variables", {})
        if "upsertBucket(" in query:
            self.runs.append(values["name"])
            project = {"id": "P", "name": values["project"], "entity": {"id": "E", "name": "team"}}
            bucket = {"id": "R", "name": values["name"], "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createArtifact(" in query:
            made = {"id": "A", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": made}}
        if "createRunFiles(" in query:
            files = [
                {"name": n, "uploadUrl": f"{self.address}/upload/{n}"} for n in values["files"]
            ]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        if "upsertView(" in query:
            return {"upsertView": {"view": self.saved_view(values), "inserted": True}}
        if "ProjectInternalId(" in query:
            return {"project": {"id": "P", "internalId": "P1"}}
        if "ProjectViews(" in query:
            kind = values.get("viewType", "runs")
            found = [view for view in self.views.values() if view["type"] == kind]
            edges = [{"node": view, "cursor": ""} for view in found]
            page = {"endCursor": "", "hasNextPage": False}
            return {"project": {"allViews": {"edges": edges, "pageInfo": page}}}
        if "models(" in query:
            page = {"__typename": "PageInfo", "endCursor": "", "hasNextPage": False}
            project = {
                "__typename": "Project", "id": "P", "name": "delta-lora", "entityName": "team",
                "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None,
            }  # fmt: skip
            return {"models": {"edges": [{"node": project}], "pageInfo": page}}
        return {"project": None, "viewer": {"entity": "team", "flags": "{}"}}

    def saved_view(self, values: dict[str, Any]) -> dict[str, Any]:
        """Keep a view or report; return what the service says of it."""
        key = values.get("id") or f"V{len(self.views)}"
        project = {"id": "P", "name": values["projectName"], "entityName": values["entityName"]}
        self.views[key] = {**values, "id": key, "project": project}
        return self.views[key]

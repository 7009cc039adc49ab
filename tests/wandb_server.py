"""A stand-in for a W&B server on loopback: it takes runs as the real one does, or answers 500, or never.

Only what wandb needs to create a run and to upload its history is answered; the rest gets an empty object.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"
"""Looks like an API key."""


class WandbServer(ThreadingHTTPServer):
    """What was uploaded, by run id: the variables of each upsert and the rows of the history by their place."""

    daemon_threads = True

    def __init__(self, behaviour: str) -> None:
        """behaviour: takes, fails (500), forbids (401) or hangs."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour, self.closing = behaviour, threading.Event()
        self.upserts: dict[str, list[dict[str, Any]]] = {}
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.ended: dict[str, int] = {}
        self.requests = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error."""

    @property
    def url(self) -> str:
        """What WANDB_BASE_URL has to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """The rows of a run in the order of their places, without wandb's own columns."""
        rows = [self.rows[run_id][place] for place in sorted(self.rows.get(run_id, {}))]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        self.server.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.behaviour == "hangs":
            self.server.closing.wait()
            self.close_connection = True
        elif self.server.behaviour == "fails":
            self._answer({}, 500)
        elif self.server.behaviour == "forbids":
            self._answer({}, 401)
        elif self.path == "/graphql":
            asked = json.loads(body)
            self._answer({"data": self._data(asked["query"], asked.get("variables") or {})})
        else:
            if self.path.endswith("/file_stream"):
                self._take(self.path.split("/")[-2], json.loads(body))
            self._answer({})

    do_GET = do_PUT = do_POST

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            run = variables["name"]
            self.server.upserts.setdefault(run, []).append(variables)
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "team"}}
            bucket = {"id": "b", "name": run, "displayName": variables.get("displayName"), "project": project, "config": "{}"}
            return {"upsertBucket": {"bucket": bucket, "inserted": len(self.server.upserts[run]) == 1}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "username": "somebody", "entity": "team", "flags": "{}"}}
        if "serverInfo" in query:
            return {"serverInfo": {"cliVersionInfo": {}, "features": []}}
        return {}

    def _take(self, run: str, stream: dict[str, Any]) -> None:
        history = stream.get("files", {}).get("wandb-history.jsonl")
        if history:
            rows = {history["offset"] + place: json.loads(line) for place, line in enumerate(history["content"])}
            self.server.rows.setdefault(run, {}).update(rows)
        if stream.get("complete"):
            self.server.ended[run] = stream["exitcode"]

    def _answer(self, answer: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def wandb_server(behaviour: str) -> Iterator[WandbServer]:
    """A server that runs while the block does."""
    server = WandbServer(behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()

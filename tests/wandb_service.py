"""A W&B service for tests on this machine: takes runs and views, refuses keys, can go away.

It answers what the client asks when it starts a run, streams its history and saves a workspace.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

__all__ = ["KEY", "WandbService"]

KEY = "f" * 40
_USER = {
    "id": "u1",
    "name": "tester",
    "username": "tester",
    "email": "tester@example.org",
    "admin": False,
    "flags": "{}",
    "entity": "team",
    "deletedAt": None,
    "teams": {"edges": []},
    "apiKeys": {"edges": []},
    "defaultEntity": {"name": "team"},
    "projects": {"edges": []},
}


class WandbService:
    """Context manager; `url` is its address."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.asked: list[str] = []  # names of queries and paths, in order
        self.views: list[dict[str, Any]] = []  # variables of each saved view
        self.runs: list[dict[str, Any]] = []  # variables of each started run
        self.rows: list[dict[str, Any]] = []  # history
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(*service._take(self.path, body))

            def do_GET(self) -> None:
                self._answer(*service._take(self.path, b""))

            do_PUT = do_POST

            def _answer(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "WandbService":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.go_away()

    def go_away(self) -> None:
        """Stop answering, as a service that is down."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def _take(self, path: str, body: bytes) -> tuple[int, Any]:
        if path.endswith("/graphql"):
            request = json.loads(body)
            match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            name = request.get("operationName") or (match[1] if match else "")
            self.asked.append(name)
            if self.refuses:
                return 401, {"errors": [{"message": "invalid API key"}]}
            return 200, {"data": self._query(name, request.get("variables") or {})}
        self.asked.append(path)
        if path.endswith("file_stream"):
            content = json.loads(body)
            history = content.get("files", {}).get("wandb-history.jsonl", {})
            self.rows += [json.loads(line) for line in history.get("content", [])]
            return 200, {"limits": {}}
        return 200, {}

    def _query(self, name: str, variables: dict[str, Any]) -> Any:
        if name == "UpsertView2":
            self.views.append(variables)
            view = {"id": "v1", "name": variables["name"]}
            return {"upsertView": {"view": view, "inserted": True}}
        if name == "UpsertBucket":
            self.runs.append(variables)
            project = {
                "id": "p1",
                "name": variables["project"],
                "entity": {"name": "team", "id": "e1"},
            }
            bucket = {
                "id": "b1",
                "name": variables["name"],
                "displayName": variables.get("displayName"),
                "description": None,
                "config": "{}",
                "sweepName": None,
                "project": project,
                "historyLineCount": 0,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/put/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "b1", "uploadHeaders": [], "files": files}}
        if name == "RunResumeStatus":
            return {"model": None}
        return {"viewer": _USER, "serverInfo": None}

"""A W&B server for tests: what its client asks of it over HTTP, answered from memory, as slowly as wished."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """url: for WANDB_BASE_URL. history: rows received, by run id. delay: seconds a call takes. bodies: everything received, for searches."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.down = False
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.views: list[dict[str, Any]] = []
        self.upserts: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None: ...

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                time.sleep(owner.delay)
                status, reply = (500, {}) if owner.down else (200, owner.reply(self.path, body))
                content = json.dumps(reply).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # the client waited no longer

            do_GET = do_POST = do_PUT = answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, path: str, body: bytes) -> dict[str, Any]:
        self.bodies.append(body)
        if stream := re.fullmatch(r"/files/[^/]*/[^/]+/([^/]+)/file_stream", path):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if history is not None:
                rows = self.history.setdefault(stream[1], [])
                del rows[history["offset"] :]
                rows += [json.loads(line) for line in history["content"]]
            return {}
        if path != "/graphql":
            return {}
        request = json.loads(body)
        variables = request.get("variables") or {}
        name = request.get("operationName") or (re.findall(r"(?:query|mutation)\s+(\w+)", request["query"]) or [""])[0]
        return {"data": self.graphql(name, variables)}

    def graphql(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        if name == "RunResumeStatus":
            return {"model": {"id": "cA==", "name": "p", "entity": {"id": "e", "name": "team"}, "bucket": self.bucket(variables["name"])}}
        if name == "UpsertBucket":
            self.upserts.append(variables)
            run_id = variables["name"]
            project = {"id": "cA==", "name": variables.get("project") or "p", "entity": {"id": "e", "name": "team"}}
            bucket = {"id": run_id, "name": run_id, "displayName": variables.get("displayName") or "", "description": "", "config": "{}"}
            bucket |= {"sweepName": None, "project": project, "historyLineCount": len(self.history.get(run_id, []))}
            return {"upsertBucket": {"bucket": bucket, "inserted": run_id not in self.history}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if name.startswith("UpsertView"):
            self.views.append(variables)
            return {
                "upsertView": {
                    "view": {"id": "Vmlldw==", "name": "nw-1", "displayName": "", "spec": "{}", "type": "project-view"},
                    "inserted": True,
                }
            }
        if name.endswith("Viewer"):
            viewer = {"id": "e", "entity": "team", "username": "u", "name": "u", "email": "", "admin": False, "flags": "{}"}
            return {"viewer": {**viewer, "apiKeys": {"edges": []}, "teams": {"edges": []}}}
        return {}

    def bucket(self, run_id: str) -> dict[str, Any] | None:
        rows = self.history.get(run_id)
        if not rows:
            return None
        found: dict[str, Any] = {
            "id": run_id,
            "name": run_id,
            "displayName": "",
            "summaryMetrics": "{}",
            "config": "{}",
            "tags": [],
            "notes": "",
        }
        found |= {"logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0, "eventsTail": "[]"}
        return found | {"historyTail": json.dumps([json.dumps(rows[-1])]), "wandbConfig": json.dumps({"t": 1})}

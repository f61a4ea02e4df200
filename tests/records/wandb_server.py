"""As much of a W&B server as wandb 0.31 asks for, on the loopback: it keeps what a run sends."""

from __future__ import annotations

import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """`history` holds the rows of metrics that arrived, `uploads` the names of files, `views` the saved
    workspaces and reports, `operations` what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.operations: list[str] = []
        self.buckets: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.uploads: list[str] = []
        self.views: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.known_key = True
        self.silent = threading.Event()  # set: what is asked of the API gets no answer until `running` ends
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.operations.append(operation)
        if operation == "UpsertBucket":
            self.buckets.append(variables)
            project = {"id": "UA==", "name": variables["project"], "entity": {"id": "RQ==", "name": "me"}}
            bucket = {"id": "Ug==", "name": variables["name"], "displayName": variables["name"], "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "config": "{}"}, "inserted": True}}
        if operation == "Viewer":
            viewer = {
                "id": "Vg==",
                "entity": "me",
                "username": "me",
                "email": "",
                "flags": "{}",
                "teams": {"edges": []},
            }
            return {"viewer": viewer}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "Ug==", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            sequence = {"id": "Uw==", "latestArtifact": None}
            return {"createArtifact": {"artifact": {"id": "QQ==", "state": "PENDING", "artifactSequence": sequence}}}
        if operation == "CreateArtifactManifest":
            file = {"id": "Rg==", "name": "m", "uploadUrl": f"{self.url}/upload/manifest", "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": "TQ==", "file": file}}}
        if operation == "CreateArtifactFiles":
            nodes = [
                {"storagePath": None, "uploadUrl": f"{self.url}/upload/{file['name']}", "uploadHeaders": [],
                 "uploadMultipartUrls": None, "artifact": {"id": "QQ=="}}
                for file in variables["input"]["artifactFiles"]
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if operation == "GetProjects":
            return {"models": {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}}
        if operation.lower().startswith("upsertview"):
            self.views.append(variables)
            told = {name: variables.get(name) for name in ("name", "displayName", "description", "type", "spec")}
            owner = {"project": {"id": "UA==", "name": variables["projectName"], "entityName": variables["entityName"]}}
            return {"upsertView": {"view": {"id": "Vmlldzox", **told, **owner}, "inserted": True}}
        if operation == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": "QQ==", "digest": ""}}}
        return {
            "ArtifactType": {"project": {"artifact": None}},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
        }.get(operation, {})

    def take(self, path: str, body: bytes) -> None:
        if path.endswith("/file_stream"):
            sent = json.loads(body)
            for line in sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                self.history.append(json.loads(line))
            if "exitcode" in sent:
                self.exit_codes.append(sent["exitcode"])
        elif path.startswith("/upload/"):
            self.uploads.append(path.removeprefix("/upload/"))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        answer, status = {}, 200
        if self.path == "/graphql":
            if self.server.silent.is_set():
                self.server.ended.wait()
            asked = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            data = self.server.answer(operation[1] if operation else "", asked.get("variables") or {})
            answer = {"data": data}
            if not self.server.known_key:
                answer, status = {"errors": [{"message": "user is not logged in"}]}, 401
        else:
            self.server.take(self.path, body)
        out = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    do_GET = do_PUT = do_POST

    def log_message(self, *words: Any) -> None: ...

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            return  # the client ended the process that held the connection


@contextmanager
def running() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()

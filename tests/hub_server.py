"""A small Hub for tests: repositories in memory, uploads as regular and as LFS files, downloads and metadata."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """`repos[name][path]` is the content of a file, `commits` are messages, `strange` are unsupported requests.

    `branches[name, branch]` has the files of another branch than `main`, such as that of a pull request.

    `received` has every byte that arrived: request lines, headers and bodies, with base64 parts decoded as well. With
    `refuse`, every request is answered by an error with this status; with `refuse_files`, the first one of an upload.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    refuse: int | None = None
    refuse_files: int | None = None
    url: str = ""

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, {"X-Error-Code": code})

    def unknown(self, repo: str) -> None:
        self.missing("RevisionNotFound" if repo in self.hub.repos else "RepoNotFound")

    def parse_request(self) -> bool:
        fine = super().parse_request()
        self.hub.received.append(self.raw_requestline + bytes(getattr(self, "headers", "")))
        return fine

    def body(self) -> bytes:
        body = self.read_body()
        decoded = (base64.b64decode(text + b"===") for text in re.findall(rb'"([A-Za-z0-9+/]{16,}=*)"', body))
        self.hub.received.extend([body, *decoded])
        return body

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.hub.refuse:
            return self.answer({"error": "Invalid credentials"}, self.hub.refuse)
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+?)(?:/revision/([\w.%-]+))?", path):
            files = self.files(match[1], match[2])
            if files is None:
                return self.unknown(match[1])
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": match[1], "modelId": match[1], "sha": self.sha(files), "siblings": siblings,
                                "private": self.hub.private[match[1]], "tags": [], "downloads": 0})  # fmt: skip
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/([\w.%-]+)", path):
            files = self.files(match[1], match[2]) or {}
            sizes = [(name, len(content), hashlib.sha1(content).hexdigest()) for name, content in files.items()]
            return self.answer([{"type": "file", "path": n, "size": size, "oid": oid} for n, size, oid in sizes])
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.%-]+)/(.+)", path):
            files = self.files(match[1], match[2])
            if files is None:
                return self.unknown(match[1])
            if match[3] not in files:
                return self.missing("EntryNotFound")
            etag = hashlib.sha256(files[match[3]]).hexdigest()
            return self.answer(files[match[3]], headers={"ETag": f'"{etag}"', "X-Repo-Commit": self.sha(files)})
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user"})
        self.hub.strange.append(f"{self.command} {self.path}")
        self.missing("EntryNotFound")

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.lfs[hashlib.sha256(content).hexdigest()] = content
        self.answer(b"")

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"].rpartition("/")[2])))
            self.hub.repos.setdefault(name, {})
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.private.setdefault(name, bool(private))
            return self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+/.+)/preupload/[\w.%-]+", path):
            if self.hub.refuse_files:
                return self.answer({"error": "No room left"}, self.hub.refuse_files)
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if re.fullmatch(r"/.+/.+\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+/.+)/branch/([\w.%-]+)", path):
            self.hub.branches[match[1], match[2]] = dict(self.hub.repos[match[1]])
            return self.answer({})
        if match := re.fullmatch(r"/api/models/(.+/.+)/commit/([\w.%-]+)", path):
            files, answer = self.files(match[1], match[2]), {}
            if "create_pr=1" in self.path:
                files = self.hub.branches[match[1], "refs%2Fpr%2F1"] = dict(files)
                answer = {"pullRequestUrl": f"{self.hub.url}/{match[1]}/discussions/1"}
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.lfs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = self.sha(files)
            url = f"{self.hub.url}/{match[1]}/commit/{sha}"
            return self.answer({"success": True, "commitOid": sha, "commitUrl": url, **answer})
        self.hub.strange.append(f"POST {self.path}")
        self.missing("EntryNotFound")

    def files(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
        """The files of a revision, which is a branch or a commit. Of each branch, only its last commit is kept."""
        states = {"main": self.hub.repos.get(repo)}
        states |= {branch: files for (name, branch), files in self.hub.branches.items() if name == repo}
        commits = {self.sha(files): files for files in states.values() if files is not None}
        return (states | commits).get(revision or "main")

    @staticmethod
    def sha(files: dict[str, bytes]) -> str:
        content = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in files.items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

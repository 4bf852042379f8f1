"""A Hugging Face Hub of a few requests on this machine: model repositories, read and written by the real client."""

import base64
import hashlib
import json
import re
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from threading import Thread
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Repositories: by name, the files of each commit and the commits that branches are at. Remembers what was asked."""

    def __init__(self):
        self.commits = {}  # (repository, commit): {path: bytes}
        self.branches = {}  # repository: {branch: commit}
        self.requests = []
        self.private = {}

    def commit(self, repo, files, branch="main"):
        branches = self.branches.setdefault(repo, {})
        merged = {**self.commits.get((repo, branches.get(branch, branches.get("main"))), {}), **files}
        name = hashlib.sha1(repr((repo, branch, len(self.commits), sorted(merged))).encode()).hexdigest()
        self.commits[repo, name], branches[branch] = merged, name
        return name

    def files(self, repo, revision="main"):
        """The commit's name and files; KeyError if there are none."""
        commit = self.branches[repo].get(revision, revision)
        return commit, self.commits[repo, commit]


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does where the client looks at it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value=None, status=200, headers=(), body=None):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, each in dict(headers).items():
            self.send_header(name, each)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, status=404):
        self.answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def find(self, repo, revision):
        """The commit and its files; None once the answer is that there are none."""
        hub = self.server.hub
        if repo not in hub.branches:
            return self.refuse("RepoNotFound", 401)
        try:
            return hub.files(repo, unquote(revision))
        except KeyError:
            return self.refuse("RevisionNotFound")

    def do_GET(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if found := self.find(match[1], match[2] or "main"):
                siblings = [{"rfilename": name} for name in found[1]]
                self.answer({"id": match[1], "sha": found[0], "siblings": siblings, "private": hub.private.get(match[1], False)})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            if found := self.find(match[1], match[2]):
                self.answer([
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in found[1].items()
                ])  # fmt: skip
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self.find(match[1], match[2]):
                data = found[1].get(match[3])
                if data is None:
                    self.refuse("EntryNotFound")
                else:
                    self.answer(body=data, headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": found[0]})
        elif path == "/":
            self.answer({})
        else:
            self.refuse(f"no such page: {path}")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        hub, path, body = self.server.hub, urlsplit(self.path).path, self.read()
        hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") == "Bearer wrong":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            if repo in hub.branches:
                self.answer({"error": "You already created this model repo", "url": f"{self.server.address}/{repo}"}, 409)
            else:
                hub.commit(repo, {".gitattributes": b""})
                hub.private[repo] = asked.get("private") or asked.get("visibility") == "private"
                self.answer({"url": f"{self.server.address}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            if match[2] in hub.branches[match[1]]:
                self.answer({"error": "Reference already exists"}, 409)
            else:
                hub.branches[match[1]][match[2]] = hub.branches[match[1]]["main"]
                self.answer({})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            names = [each["path"] for each in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
            }  # fmt: skip
            commit = hub.commit(match[1], files, unquote(match[2]))
            self.answer({"success": True, "commitOid": commit, "commitUrl": f"{self.server.address}/{match[1]}/commit/{commit}"})
        else:
            self.refuse(f"no such page: {path}")


@contextmanager
def fake_hub(monkeypatch, cache):
    """Has huggingface_hub's client talk to a FakeHub, with a cache of its own and no account."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub, server.address = FakeHub(), f"http://127.0.0.1:{server.server_port}"
    redirect(monkeypatch, server.address, cache)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def no_connection(monkeypatch, cache):
    """Has the client find nobody at the Hub's address, and fail where it would wait and ask again."""

    def sleep(seconds):
        raise AssertionError(f"asks again in {seconds} s")

    with socket() as unused:
        unused.bind(("127.0.0.1", 0))
        redirect(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}", cache)
    monkeypatch.setattr("time.sleep", sleep)


def redirect(monkeypatch, address, cache):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if "transformers.utils.hub" in sys.modules:  # it keeps a client, with its address
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)

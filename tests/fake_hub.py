"""A server that answers huggingface_hub as the hub does, on this machine: repositories are folders OWNER/NAME."""

import hashlib
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves the repositories below a folder while the `with` block lasts.

    gated: names of repositories that need a licence; broken: names of files of which only the first half is sent.
    requests: method and path of each request so far.
    """

    def __init__(self, folder: Path, gated=(), broken=()):
        self.folder, self.gated, self.broken, self.requests = Path(folder), gated, set(broken), []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        """OWNER/NAME/FILE of every file whose content was asked for."""
        found = [path.split("/resolve/") for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return sorted(f"{repo[1:]}/{file.partition('/')[2]}" for repo, file in found)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: FakeHub, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", headers=None, short: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if short else body)
            self.close_connection = self.close_connection or short

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        repo = self.hub.folder / name
        if not repo.is_dir():
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        _, _, rest = path.partition(name)
        action, _, rest = rest.strip("/").partition("/")
        if action in ("revision", "tree", "resolve") and rest.split("/")[0] not in ("main", COMMIT):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "No such revision"})
        files = [file for file in sorted(repo.rglob("*")) if file.is_file()]
        if path.startswith("/api/"):
            names = [file.relative_to(repo).as_posix() for file in files]
            tree = [{"type": "file", "path": n, "size": (repo / n).stat().st_size, "oid": COMMIT} for n in names]
            info = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
            info |= {"siblings": [{"rfilename": n} for n in names], "downloads": 0, "likes": 0}
            return self.answer(200, json.dumps(tree if action == "tree" else info).encode())
        if name in self.hub.gated:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        file = repo / rest.partition("/")[2]
        if not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, b"", headers | {"Content-Length": str(len(content))})
        if start:
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        short = rest.rpartition("/")[2] in self.hub.broken
        return self.answer(206 if start else 200, content[start:], headers, short)

    do_HEAD = do_GET

"""A server that speaks the Hub's protocol for datasets on this machine, and fails as it is told to."""

import contextlib
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 2  # entries of a listing's page

ANSWERS: dict[str, tuple[int, dict[str, str]]] = {
    "429": (429, {"Retry-After": "7"}),
    "429 RateLimit": (429, {"RateLimit": '"resolvers";r=0;t=55'}),
    "500": (500, {}),
    "503": (503, {}),
    "stale link": (403, {}),
}


@dataclass
class Hub:
    """Datasets by name, each of refs and of commits, which hold files."""

    url: str = ""
    elsewhere: str = ""  # the same server by another name, where bytes are
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)  # of datasets: status and X-Error-Code
    faults: list[tuple[str, str]] = field(default_factory=list)  # a part of the address, and what to do once
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def commit(self, repo: str, ref: str, files: dict[str, bytes]) -> str:
        """Let a branch of a dataset hold these files; returns the commit."""
        sha = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = files
        self.refs.setdefault(repo, {})[ref] = sha
        return sha

    def asked(self, part: str) -> list[tuple[str, dict[str, str]]]:
        """Requests with this in their address."""
        return [each for each in self.requests if part in each[0]]


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Serve until the end of the block."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # connections that tests reset
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.elsewhere = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 5
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.hub
        address = urlsplit(self.path)
        path = unquote(address.path)
        hub.requests.append((path, dict(self.headers)))
        fault = next((each for each in hub.faults if each[0] in path), None)
        if fault:
            hub.faults.remove(fault)
            if fault[1] in ANSWERS:
                self.answer(ANSWERS[fault[1]][0], b"no", ANSWERS[fault[1]][1])
                return
            if fault[1] == "timeout":
                hub.closing.wait(5)
                self.close_connection = True
                return
        how = fault[1] if fault else ""
        for repo, (status, code) in hub.refusals.items():
            if f"/{repo}/" in path:
                self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
                return
        if path.startswith("/cdn/"):
            _, _, sha, name = path.split("/", 3)
            self.send_file(hub.commits[sha][name], how)
        elif path.startswith("/datasets/"):
            repo, rest = path.removeprefix("/datasets/").split("/resolve/")
            self.answer(302, b"", {"Location": f"{hub.elsewhere}/cdn/{rest}"})
        elif "/revision/" in path:
            repo, ref = path.removeprefix("/api/datasets/").split("/revision/")
            if ref in hub.refs.get(repo, {}):
                self.answer(200, json.dumps({"id": repo, "sha": hub.refs[repo][ref]}).encode(), {}, how)
            else:
                self.refuse("RevisionNotFound" if repo in hub.refs else "RepoNotFound")
        else:
            self.list(path, address.query, how)

    def list(self, path: str, query: str, how: str) -> None:
        repo, rest = path.removeprefix("/api/datasets/").split("/tree/")
        commit, _, folder = rest.partition("/")
        files = self.hub.commits.get(self.hub.refs.get(repo, {}).get(commit, commit))
        if files is None:
            self.refuse("RevisionNotFound")
            return
        options = parse_qs(query)
        prefix = f"{folder}/" if folder else ""
        entries = []
        for name in sorted(files, reverse=True):  # the order is not promised
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                entries.append({"type": "directory", "path": prefix + "/".join(parts[:depth]), "size": 0})
            entries.append({"type": "file", "path": name, "size": len(files[name])})
        if options["recursive"] == ["false"]:
            entries = [each for each in entries if "/" not in str(each["path"]).removeprefix(prefix)]
        entries = [each for number, each in enumerate(entries) if each not in entries[:number]]
        if folder and not entries:
            self.refuse("EntryNotFound")
            return
        start = int(options.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):  # the Hub names itself, even behind a mirror
            following = f"{path}?{query.partition('&cursor')[0]}&cursor={start + PAGE}"
            headers["Link"] = f'<https://huggingface.co{following}>; rel="next"'
        self.answer(200, json.dumps(entries[start : start + PAGE]).encode(), headers, how)

    def send_file(self, content: bytes, how: str) -> None:
        first, last = 0, len(content) - 1
        status, headers = 200, {}
        if (wanted := self.headers.get("Range")) and "range ignored" not in how:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), int(end)
            if how == "wrong range":
                shift = -1 if first else 1
                first, last = first + shift, last + shift
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status = 206
        body = content[first : last + 1]
        if how == "corrupt":
            body = bytes(byte ^ 0x5A for byte in body)
        if how == "too long":
            body += b"more"
        self.answer(status, body, headers, how)

    def answer(self, status: int, body: bytes, headers: dict[str, str], how: str = "") -> None:
        self.send_response(status)
        if how == "packed":
            headers, body = headers | {"Content-Encoding": "br"}, body[::-1]
        for name, value in headers.items():
            self.send_header(name, value)
        if "length unknown" in how:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if "ends early" in how or how == "reset":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)
        if how == "reset":
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def refuse(self, code: str) -> None:
        self.answer(401 if code == "RepoNotFound" else 404, b"{}", {"X-Error-Code": code})

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

"""A hub on this machine: the routes of huggingface.co that a client uses, a storage on another port for large
files, and faults at will."""

import dataclasses
import hashlib
import http.server
import json
import socket
import threading
import urllib.parse

LARGE = (".safetensors", ".bin", ".parquet")  # what the hub keeps in its storage


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclasses.dataclass
class Repository:
    revisions: dict  # name -> {path: bytes}
    discussions: list = dataclasses.field(default_factory=list)
    gated: bool = False  # answers only to the token of GOOD_TOKEN
    private: bool = False

    def commit(self, revision):
        files = self.revisions[revision]
        text = json.dumps({path: git_sha1(data) for path, data in sorted(files.items())})
        return hashlib.sha1(text.encode()).hexdigest()

    def find(self, revision):
        """The files behind a branch, a pull request or a commit."""
        for name, files in self.revisions.items():
            if revision in (name, self.commit(name)):
                return self.commit(name), files
        return None, None


GOOD_TOKEN = "hf_good"


@dataclasses.dataclass
class Fault:
    """What happens to one answer with a file's content, or to one answer of the API."""
    status: int = 0  # instead of the content
    headers: dict = dataclasses.field(default_factory=dict)
    cut_after: int = -1  # bytes of the body, then the connection is closed
    stall_after: int = -1  # bytes of the body, then nothing until the server ends
    flip: int = -1  # the lowest bit of this byte
    extra: int = 0  # bytes more (or fewer) than the file has
    ignore_range: bool = False


@dataclasses.dataclass
class Exchange:
    """One answer, as the test sees it afterwards."""
    server: str  # hub, storage
    method: str
    path: str
    headers: dict
    sent: int = 0  # bytes of the body


class Hub:
    """A server for `with`. `repositories` maps "models/owner/name" and "datasets/owner/name"; `faults` maps a
    file's path in its repository, or "api", to the faults of the next answers."""

    def __init__(self, tls=None):
        """With `tls` (an ssl.SSLContext) the hub, not its storage, is https."""
        self.tls = tls
        self.repositories, self.faults, self.exchanges = {}, {}, []
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.servers = {}
        for name, handler in (("hub", HubHandler), ("storage", StorageHandler)):
            self.servers[name] = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            self.servers[name].daemon_threads = True
            self.servers[name].hub = self
            if tls and name == "hub":
                self.servers[name].socket = tls.wrap_socket(self.servers[name].socket, server_side=True)
            threading.Thread(target=self.servers[name].serve_forever, kwargs={"poll_interval": 0.02},
                             daemon=True).start()

    def url(self, name="hub"):
        scheme = "https" if self.tls and name == "hub" else "http"
        return f"{scheme}://127.0.0.1:{self.servers[name].server_address[1]}"

    def add(self, kind, repo, files, revision="main", **changes):
        key = f"{kind}s/{repo}"
        if key not in self.repositories:
            self.repositories[key] = Repository({}, **changes)
        self.repositories[key].revisions[revision] = files
        return self.repositories[key].commit(revision)

    def end(self):
        self.ended.set()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.end()

    def take_fault(self, path):
        with self.lock:
            queue = self.faults.get(path, [])
            return queue.pop(0) if queue else Fault()

    def blob(self, sha256):
        for repository in self.repositories.values():
            for files in repository.revisions.values():
                for path, data in files.items():
                    if hashlib.sha256(data).hexdigest() == sha256:
                        return path, data
        return None, None

    def requested(self, method="GET"):
        """The paths of files whose content was asked for."""
        return [exchange.path for exchange in self.exchanges if exchange.method == method]

    def bytes_sent(self, path):
        return sum(exchange.sent for exchange in self.exchanges if exchange.path == path)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name = ""

    def log_message(self, *arguments):
        pass

    def note(self, path):
        exchange = Exchange(self.name, self.command, path, {k.lower(): v for k, v in self.headers.items()})
        with self.server.hub.lock:
            self.server.hub.exchanges.append(exchange)
        return exchange

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_content(self, path, data, headers, exchange):
        """A whole file, or what is left of it after a Range, with the fault that is due."""
        fault = self.server.hub.take_fault(path)
        if fault.status:
            return self.answer(fault.status, fault.headers, b"busy")
        start = 0
        wanted = self.headers.get("Range")
        if wanted and not fault.ignore_range:
            start = int(wanted.removeprefix("bytes=").rstrip("-").split("-")[0])
            if start >= len(data):
                return self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
        whole = data + b"x" * fault.extra if fault.extra >= 0 else data[:fault.extra]
        if 0 <= fault.flip < len(whole):
            whole = whole[:fault.flip] + bytes([whole[fault.flip] ^ 1]) + whole[fault.flip + 1:]
        body = whole[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        stop = max(fault.cut_after, fault.stall_after)
        part = body if stop < 0 else body[:stop]
        for i in range(0, len(part), 1 << 14):
            self.wfile.write(part[i:i + (1 << 14)])
            exchange.sent += len(part[i:i + (1 << 14)])
        if fault.stall_after >= 0:
            self.wfile.flush()
            self.server.hub.ended.wait()
        if len(part) < len(body):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self):
        try:
            super().handle()
        except (ConnectionError, OSError):
            pass  # the client went away


class StorageHandler(Handler):
    name = "storage"

    def do_GET(self):
        path, data = self.server.hub.blob(self.path.removeprefix("/blob/"))
        exchange = self.note(path)
        self.send_content(path, data, {"ETag": '"of-the-storage"'}, exchange)


class HubHandler(Handler):
    name = "hub"

    def do_GET(self):
        parts = [urllib.parse.unquote(part) for part in self.path.split("?")[0].strip("/").split("/")]
        if parts[0] == "api":
            return self.answer_api(parts[1:])
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        repository = self.server.hub.repositories.get(f"{kind}/{parts[0]}/{parts[1]}")
        path = "/".join(parts[4:])
        exchange = self.note(path)
        if self.refuse(repository, content=True):
            return None
        commit, files = repository.find(parts[3])
        if commit is None:
            return self.refuse_with(404, "RevisionNotFound")
        if path not in files:
            return self.refuse_with(404, "EntryNotFound")
        data = files[path]
        headers = {"X-Repo-Commit": commit}
        if path.endswith(LARGE):
            sha256 = hashlib.sha256(data).hexdigest()
            headers.update({"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data)),
                            "Location": f"{self.server.hub.url('storage')}/blob/{sha256}"})
            return self.answer(302, headers)
        headers["ETag"] = f'"{git_sha1(data)}"'
        if self.command == "HEAD":
            return self.answer(200, {**headers, "Content-Length": str(len(data))})
        return self.send_content(path, data, headers, exchange)

    do_HEAD = do_GET

    def answer_api(self, parts):
        self.note("api/" + "/".join(parts))
        fault = self.server.hub.take_fault("api")
        if fault.status:
            return self.answer(fault.status, fault.headers, b"busy")
        repository = self.server.hub.repositories.get("/".join(parts[:3]))
        if self.refuse(repository, content=False):
            return None
        if parts[3] == "discussions":
            return self.answer(200, body=json.dumps({"discussions": repository.discussions}).encode()
                               if "p=0" in self.path else b'{"discussions": []}')
        commit, files = repository.find(parts[4] if len(parts) > 4 else "main")
        if commit is None:
            return self.refuse_with(404, "RevisionNotFound")
        if parts[3] == "tree":
            tree = []
            for path, data in files.items():
                entry = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
                if path.endswith(LARGE):
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                tree.append(entry)
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
        info = {"id": "/".join(parts[1:3]), "sha": commit, "siblings": [{"rfilename": path} for path in files]}
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def refuse(self, repository, content):
        """As the hub: who may not see a repository is not told that it is there."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and not token.startswith("hf_"):
            return self.refuse_with(401, "", "Invalid credentials in Authorization header")
        if repository is None or (repository.private and token != GOOD_TOKEN):
            return self.refuse_with(404 if token else 401, "RepoNotFound")
        if repository.gated and content and token != GOOD_TOKEN:
            return self.refuse_with(403 if token else 401, "GatedRepo")
        return False

    def refuse_with(self, status, code, message="refused"):
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": message})
        return True

# SPDX-License-Identifier: Apache-2.0
"""A hub in a thread, with what a download and an upload of huggingface_hub ask for. It can cut answers short."""

import hashlib
import json
import os
import re
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from threading import Event, Thread
from urllib.parse import unquote, urlsplit


class SmallHub:
    """One repository of models by name, each with its files by revision.

    Args:
        home: Where a process that asks keeps its files.
        variables: More of its environment variables.

    Attributes:
        environment: The environment variables of a process that asks.
        repositories: Files by repository and revision.
        token: Who asks has to give this token. None: everybody may ask.
        cut: How many bytes of a large file a download gets before the hub falls silent, once. None for all.
        silent: Set when it has, until `go_on` is.
        asked: Files that were asked for, with the first byte.
        stored: Large files that were uploaded, by their hashes.
        private: Repositories that were made private.
        sent: The hashes of large files, each time that one was sent.
        stop_after: After how many large files an upload meets silence, None for never. `begun` counts them.
    """

    def __init__(self, home, **variables):
        self.repositories, self.token, self.cut = {}, None, None
        self.asked, self.stored, self.private = [], {}, set()
        self.silent, self.go_on = Event(), Event()
        self.sent, self.begun, self.stop_after = [], count(), None
        hub = self

        class Handler(_Handler):
            small_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        theirs = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.environment = theirs | switches | {"HF_ENDPOINT": self.url, "HF_HOME": str(home)} | variables

    def __enter__(self):
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def add(self, name, folder, revision="main"):
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.repositories.setdefault(name, {})[revision] = files


def commit_of(revision):
    return hashlib.sha1(revision.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    small_hub = None

    def log_message(self, *_):
        pass

    def answer(self, content, code=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, error):
        self.answer({"error": error}, code, X_Error_Code=error, X_Error_Message=error)

    def files(self, name, revision):
        revisions = self.small_hub.repositories.get(name)
        if revisions is None:
            self.refuse(404, "RepoNotFound")
            return None
        found = {commit_of(each): files for each, files in revisions.items()} | revisions
        if revision not in found:
            self.refuse(404, "RevisionNotFound")
        return found.get(revision)

    def allowed(self):
        if self.small_hub.token and self.headers.get("Authorization") != f"Bearer {self.small_hub.token}":
            self.refuse(401, "RepoNotFound")
            return False
        return True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if not self.allowed():
            return
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([\w.-]+))?", path):
            name, revision = found[1], found[2] or "main"
            if (files := self.files(name, revision)) is not None:
                sha = revision if len(revision) == 40 else commit_of(revision)
                self.answer({"id": name, "sha": sha, "siblings": [{"rfilename": each} for each in files]})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/([\w.-]+)", path):
            if (files := self.files(found[1], found[2])) is not None:
                tree = [(each, len(data), hashlib.sha1(data).hexdigest()) for each, data in files.items()]
                self.answer([{"type": "file", "path": each, "size": size, "oid": oid} for each, size, oid in tree])
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path):
            name, revision, file = found.groups()
            if (files := self.files(name, revision)) is None:
                return
            if file not in files:
                self.refuse(404, "EntryNotFound")
                return
            self.send_file(file, files[file], revision)
        else:
            self.refuse(404, "NotFound")

    def send_file(self, file, data, revision):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if self.command == "GET":
            self.small_hub.asked.append((file, start))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", revision if len(revision) == 40 else commit_of(revision))
        self.end_headers()
        if self.command == "GET":
            cut, stop = self.small_hub.cut, len(data)
            if cut is not None and stop - start > cut:
                self.wfile.write(data[start : start + cut])
                self.small_hub.cut = None
                self.small_hub.silent.set()
                self.small_hub.go_on.wait(60)
                self.close_connection = True
                return
            self.wfile.write(data[start:stop])

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self):
        data, hub = self.body(), self.small_hub
        if hub.stop_after is not None and next(hub.begun) >= hub.stop_after:
            hub.silent.set()
            hub.go_on.wait(60)
            self.close_connection = True
            return
        oid = hashlib.sha256(data).hexdigest()
        hub.stored[oid] = data
        hub.sent.append(oid)
        self.answer({}, ETag='"0"')

    def do_POST(self):
        path, body, hub = unquote(urlsplit(self.path).path), self.body(), self.small_hub
        if not self.allowed():
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            hub.repositories.setdefault(name, {"main": {}})
            hub.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
            self.answer({"url": f"{hub.url}/{name}", "id": name})
        elif re.fullmatch(r"/api/models/[\w.-]+/[\w.-]+/preupload/main", path):
            files = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {
                            "path": each["path"],
                            "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for each in files
                    ]
                }
            )
        elif path.endswith("/info/lfs/objects/batch"):
            objects = []
            for each in json.loads(body)["objects"]:
                url = f"{hub.url}/upload/{each['oid']}"
                actions = {} if each["oid"] in hub.stored else {"actions": {"upload": {"href": url}}}
                objects.append({"oid": each["oid"], "size": each["size"], **actions})
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
            files = hub.repositories[found[1]]["main"]
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.stored[value["oid"]]
            sha = commit_of("main")
            self.answer({"commitUrl": f"{hub.url}/{found[1]}/commit/{sha}", "commitOid": sha, "success": True})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.refuse(404, "NotFound")

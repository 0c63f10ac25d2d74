"""Push to and pull from the hub, as its own client speaks to a small stand-in on loopback.

The stand-in knows repositories, listings, ranged downloads and commits with their files inline.
Transfers of large files (LFS, Xet) are the client's own and are not covered here.
"""

import base64
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from duet_unlearn.errors import CacheError
from duet_unlearn.teacher_cache.format.manifest import read_manifest
from duet_unlearn.teacher_cache.share.store import parse_hub_url

COMMAND = "from duet_unlearn.cli.cache import main; main()"
SHA1 = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    files: dict[str, bytes] | None = None
    """Of the one dataset repository, or None while there is none."""
    private: bool | None = None
    commits: list[list[str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    url: str = ""


def _make_handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.split("?")[0]
            hub.requests.append(f"POST {path}")
            if path == "/api/repos/create":
                if hub.files is not None:
                    self._json({"error": "exists", "url": f"{hub.url}/datasets/o/n"}, 409)
                    return
                asked = json.loads(body)
                # Older clients say `private`, newer ones `visibility`.
                hub.files = {}
                hub.private = asked.get("private") or asked.get("visibility") == "private"
                self._json({"url": f"{hub.url}/datasets/o/n"})
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif path == "/api/datasets/o/n/preupload/main":
                names = [file["path"] for file in json.loads(body)["files"]]
                self._json({"files": [self._regular(name) for name in names]})
            elif path == "/api/datasets/o/n/paths-info/main":
                entries = [self._entry(p) for p in json.loads(body)["paths"] if p in hub.files]
                self._json(entries)
            elif path == "/api/datasets/o/n/commit/main":
                lines = [json.loads(line)["value"] for line in body.splitlines()]
                added = {f["path"]: base64.b64decode(f["content"]) for f in lines[1:]}
                hub.files.update(added)
                hub.commits.append(sorted(added))
                self._json(
                    {"commitUrl": f"{hub.url}/datasets/o/n/commit/{SHA1}", "commitOid": SHA1}
                )
            else:
                self._json({"error": "unknown"}, 404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            hub.requests.append(f"{self.command} {path}")
            if hub.files is None:
                self._json({"error": "no"}, 404, {"X-Error-Code": "RepoNotFound"})
            elif match := re.fullmatch(r"/api/datasets/o/n/tree/main(?:/(.*))?", path):
                self._tree(match.group(1) or "")
            elif match := re.fullmatch(r"/datasets/o/n/resolve/main/(.*)", path):
                self._file(match.group(1))
            elif path.startswith("/api/datasets/o/n"):
                self._json({"id": "o/n", "sha": SHA1, "private": True, "tags": [], "siblings": []})
            else:
                self._json({"error": "unknown"}, 404)

        def _tree(self, folder: str) -> None:
            inside = folder + "/" if folder else ""
            below = [p for p in hub.files if p.startswith(inside)]
            folders = {inside + p[len(inside) :].split("/")[0] for p in below} - hub.files.keys()
            entries = [self._entry(p) for p in below if "/" not in p[len(inside) :]]
            entries += [{"type": "directory", "path": p, "oid": SHA1, "size": 0} for p in folders]
            if folder and not below:
                self._json({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            self._json(entries)

        def _entry(self, path: str) -> dict:
            return {"type": "file", "path": path, "oid": SHA1, "size": len(hub.files[path])}

        def _regular(self, name: str) -> dict:
            return {"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None}

        def _file(self, path: str) -> None:
            if path not in hub.files:
                self._json({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            data, status = hub.files[path], 200
            if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                data, status = data[int(match.group(1)) : int(match.group(2)) + 1], 206
            self._answer(status, data, {"ETag": f'"{SHA1}"', "X-Repo-Commit": SHA1})

        def _json(self, value: object, status: int = 200, extra: dict | None = None) -> None:
            kind = {"Content-Type": "application/json"}
            self._answer(status, json.dumps(value).encode(), {**kind, **(extra or {})})

        def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(hub)) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def run(hub: Hub, *arguments: object) -> subprocess.CompletedProcess[str]:
    # The hub's client reads its address when it is imported, hence a process of its own.
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_a_cache_goes_to_the_hub_in_one_commit_and_back(
    hub: Hub, shared_cache: Path, tmp_path: Path
) -> None:
    url = "hf://datasets/o/n"
    sent = run(hub, "push", shared_cache, url, "--json")
    assert sent.returncode == 0, sent.stderr
    assert json.loads(sent.stdout)["moved_shards"] == 5
    assert hub.private is True
    names = sorted(str(p.relative_to(shared_cache)) for p in shared_cache.rglob("*.*"))
    assert hub.commits == [names]
    digest = read_manifest(shared_cache).digest
    got = run(hub, "pull", f"{url}@{digest}", tmp_path / "here", "--json")
    assert got.returncode == 0, got.stderr
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (shared_cache / name).read_bytes()
    listed = run(hub, "list", url, "--json")
    assert json.loads(listed.stdout)[0]["digest"] == digest
    again = run(hub, "push", shared_cache, url, "--json")
    assert json.loads(again.stdout)["hit"] is True
    assert len(hub.commits) == 1


def test_files_of_others_in_a_repository_are_never_replaced(hub: Hub, shared_cache: Path) -> None:
    hub.files = {".gitattributes": b"", "README.md": b"mine"}
    result = run(hub, "push", shared_cache, "hf://datasets/o/n")
    assert result.returncode == 1
    assert "hf://datasets/o/n: holds 'README.md', which is not of this cache" in result.stderr
    assert hub.commits == []
    assert run(hub, "push", shared_cache, "hf://datasets/o/n/caches/a").returncode == 0
    assert hub.files["README.md"] == b"mine"
    assert "caches/a/manifest.json" in hub.files


def test_a_repository_that_is_not_there_gives_one_line(hub: Hub, tmp_path: Path) -> None:
    result = run(hub, "pull", "hf://datasets/o/n", tmp_path / "here")
    assert result.returncode == 1
    assert result.stderr == (
        "error: hf://datasets/o/n/manifest.json: no such repository for this user; check the name "
        "and HF_TOKEN\n"
    )


def test_hub_urls_are_taken_apart() -> None:
    place = parse_hub_url("hf://datasets/org/name@dev/caches/a")
    assert place == ("org/name", "dev", "caches/a")
    assert parse_hub_url("hf://datasets/org/name") == ("org/name", None, None)
    for url in ("hf://org/name", "hf://datasets/name", "hf://models/org/name"):
        with pytest.raises(CacheError, match="expected hf://datasets/ORG/NAME"):
            parse_hub_url(url)

"""A small cache of several shards, and the servers that it is shared through."""

import contextlib
import http.client
import http.server
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

SHA = "sha256:" + "ab" * 32
MakeCache = Callable[..., Path]
_RECIPE = {
    **dict.fromkeys(("weights", "config", "tokenizer", "vocabulary"), SHA),
    "vocab_size": 90,
    "chat_template": None,
    "template_date": "2024-07-26",
    "prefix": "Forget.",
    "prefix_place": "raw",
    "retain_prefix": True,
    "top_k": 4,
    "positions": 2,
    "logit_dtype": "float16",
    "compute_dtype": "float32",
    "eos_token_ids": (1,),
}


def _row(identity: tuple[str, str, str], seed: Any, recipe: Any, shift: float = 0.0) -> Any:
    """A row of two positions with a random signal, its logits moved by `shift`."""
    from duet_unlearn.teacher_cache.format.schema import CacheRow
    from duet_unlearn.teacher_cache.format.signal import Signal

    query_id, split, text = identity
    rng = np.random.default_rng(seed)
    logits = -np.sort(-rng.normal(0, 2, (2, recipe.top_k)), axis=1).astype(np.float32)
    ids = [rng.choice(recipe.vocab_size, recipe.top_k, replace=False) for _ in "ab"]
    return CacheRow(
        query_id=query_id,
        split=split,
        query=text,
        prompt_ids=np.arange(3, dtype=np.int32),
        signal=Signal(
            response_ids=np.array([7, 8], np.int32),
            token_ids=np.stack(ids).astype(np.int32),
            logits=logits + np.float32(shift),
            logsumexp=(logits.max(axis=1) + 1 + shift).astype(np.float32),
        ),
    )


@pytest.fixture(scope="session")
def make_cache() -> MakeCache:
    """Write a sound cache of random signals, about 25 kB a shard; the seed decides its queries."""
    from duet_unlearn.data.queries import fingerprint_hashes, hash_row
    from duet_unlearn.teacher_cache.format.card import write_card
    from duet_unlearn.teacher_cache.format.manifest import Manifest
    from duet_unlearn.teacher_cache.format.recipe import Recipe
    from duet_unlearn.teacher_cache.format.shard import ShardHeader, write_shard
    from duet_unlearn.teacher_cache.format.statistics import rows_statistics

    def make(
        folder: Path, *, shards: int = 5, shard_rows: int = 40, seed: int = 0, **changes: object
    ) -> Path:
        large = {"vocab_size": 5000, "top_k": 32, "logit_dtype": "float32"}
        recipe = Recipe(**{**_RECIPE, **large, **changes})  # type: ignore[arg-type]
        (folder / "shards").mkdir(parents=True)
        identities = [
            (
                f"q{number:04}",
                "forget" if number % shard_rows < shard_rows * 2 // 5 else "retain",
                f"query {number} of {seed}",
            )
            for number in range(shard_rows * shards)
        ]
        rows = [_row(row, [number, seed], recipe) for number, row in enumerate(identities)]
        queries = fingerprint_hashes(map(hash_row, identities))
        entries = []
        for index in range(shards):
            part = rows[index * shard_rows : (index + 1) * shard_rows]
            header = ShardHeader(
                recipe=recipe, queries=queries, index=index, count=shards, engines=({},)
            )
            entries.append(write_shard(folder, part, header))
        sums = rows_statistics(rows)
        manifest = Manifest(
            recipe=recipe,
            teacher="tiny",
            queries=queries,
            engines=({},),
            shards=tuple(entries),
            splits={split: sums[split] for split in recipe.splits},
            samples=(),
        )
        write_card(folder, manifest.write(folder))
        return folder

    return make


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> Path:
    """Five shards of 40 rows; never changed by a test."""
    return make_cache(tmp_path_factory.mktemp("shared") / "cache")


@pytest.fixture
def cache_copy(shared_cache: Path, tmp_path: Path) -> Path:
    """The same cache, to be changed."""
    return Path(shutil.copytree(shared_cache, tmp_path / "copy"))


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what is kept between runs."""
    monkeypatch.setenv("DUET_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duet_unlearn.teacher_cache.share.store._FIRST_PAUSE_SECONDS", 0.01)


@dataclass
class WebServer:
    """A real HTTP server over a folder, and how it misbehaves; paths begin with a slash."""

    folder: Path
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """For each path, after how many bytes its next answers break off."""
    answers: dict[str, list[bytes | int]] = field(default_factory=dict)
    """For each path, bodies or statuses of its next answers; the last one stays."""
    hold: threading.Event | None = None
    """An answer that is to be cut waits for it, so that what was sent has been read."""
    endless: set[str] = field(default_factory=set)
    """Paths whose answer never ends."""
    requests: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def shard_requests(self) -> list[str]:
        return [path for path in self.requests if path.endswith(".parquet")]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, web: WebServer, *args) -> None:
        self.web = web
        super().__init__(*args)

    def do_GET(self) -> None:
        web, path = self.web, self.path
        web.requests.append(path)
        if "Authorization" in self.headers:
            web.authorizations.append(self.headers["Authorization"])
        body = self._body(path)
        if isinstance(body, int):
            self._head(body, 0)
            return
        if path in web.endless:
            self._head(200, 1 << 40)
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x" * 65536)
            return
        self._head(200, len(body))
        cuts = web.cuts.get(path, [])
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.close_connection = True
            if web.hold is not None:
                web.hold.wait(30)
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body)

    def _body(self, path: str) -> bytes | int:
        answers = self.web.answers.get(path)
        if answers:
            return answers.pop(0) if len(answers) > 1 else answers[0]
        file = self.web.folder / path.lstrip("/")
        return file.read_bytes() if file.is_file() else 404

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Threads(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def _serving(handler: Callable[..., object]) -> Iterator[int]:
    with _Threads(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def web(shared_cache: Path) -> Iterator[WebServer]:
    """A web server with the shared cache at its root."""
    server = WebServer(folder=shared_cache)
    with _serving(partial(_Handler, server)) as server.port:
        yield server


@dataclass
class Proxy:
    """A TCP relay to the S3 server that counts what passes and breaks connections."""

    target: tuple[str, int]
    cuts_up: list[int] = field(default_factory=list)
    """After how many bytes to the server the next connections that send a shard break."""
    cuts_down: list[int] = field(default_factory=list)
    """After how many bytes from the server the next connections that fetch a shard break."""
    most_shards: int | None = None
    """How many shards may be sent before every further connection with one is refused."""
    passed_up: list[int] = field(default_factory=list)
    """Bytes to the server, a connection."""
    seen: list[str] = field(default_factory=list)
    """`METHOD /path` of the requests."""
    port: int = 0

    def of(self, method: str, ending: str = "") -> list[str]:
        return [line for line in self.seen if line.startswith(method) and line.endswith(ending)]

    def forget(self) -> None:
        # A new list each time: a connection that began before adds its bytes to the old one.
        self.passed_up = []
        self.seen.clear()

    @property
    def up(self) -> int:
        return sum(self.passed_up)


class _Relay(socketserver.BaseRequestHandler):
    """One connection; the server closes it after each answer."""

    def __init__(self, proxy: Proxy, *args) -> None:
        self.proxy = proxy
        super().__init__(*args)

    def handle(self) -> None:
        proxy = self.proxy
        first = self.request.recv(65536)
        request = first.partition(b" HTTP/1.1")[0].decode().split("?")[0]
        proxy.seen.append(request)
        passed_up = proxy.passed_up
        up = down = None
        if request.startswith("PUT") and request.endswith(".parquet"):
            sent = len(proxy.of("PUT", ".parquet"))
            if proxy.most_shards is not None and sent > proxy.most_shards:
                return
            up = proxy.cuts_up.pop(0) if proxy.cuts_up else None
        elif request.startswith("GET") and request.endswith(".parquet"):
            down = proxy.cuts_down.pop(0) if proxy.cuts_down else None
        with socket.create_connection(proxy.target) as server:
            back = threading.Thread(
                target=self._relay, args=(server, self.request, b"", down), daemon=True
            )
            back.start()
            passed_up.append(self._relay(self.request, server, first, up))
            back.join()

    @staticmethod
    def _relay(source: socket.socket, sink: socket.socket, data: bytes, limit: int | None) -> int:
        passed = 0
        with contextlib.suppress(OSError):
            while data := data or source.recv(65536):
                data = data if limit is None else data[: limit - passed]
                sink.sendall(data)
                passed += len(data)
                if passed == limit:
                    break
                data = b""
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return passed


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, int]]:
    """A real S3 server in a process of its own."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 26)}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        for _ in range(1800):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, "the S3 server ended"
            time.sleep(0.1)
        yield "127.0.0.1", port
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Bucket:
    """An empty bucket and the relay in front of its server."""

    url: str
    proxy: Proxy
    server: tuple[str, int]

    def keys(self) -> list[str]:
        """Ask the server itself, past the relay."""
        connection = http.client.HTTPConnection(*self.server)
        connection.request("GET", f"/{urlsplit(self.url).netloc}?list-type=2")
        text = connection.getresponse().read().decode()
        connection.close()
        return re.findall(r"<Key>([^<]+)</Key>", text)

    def put(self, key: str, data: bytes) -> None:
        self._ask("PUT", key, data)

    def delete(self, key: str) -> None:
        self._ask("DELETE", key, None)

    def _ask(self, method: str, key: str, data: bytes | None) -> None:
        connection = http.client.HTTPConnection(*self.server)
        # The server asks for a signature and does not check it.
        signed = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"
        path = f"/{urlsplit(self.url).netloc}/{key}"
        connection.request(method, path, body=data, headers={"Authorization": signed})
        response = connection.getresponse()
        assert response.status in (200, 204), response.read()
        connection.close()


@pytest.fixture
def bucket(
    s3_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Bucket]:
    """An empty bucket that s3fs finds through the environment, as users set it."""
    name = "bucket-" + re.sub(r"[^a-z0-9]", "-", tmp_path.name.lower())[-40:].strip("-")
    connection = http.client.HTTPConnection(*s3_server)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()
    # s3fs tries again by itself, and so does botocore below it.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy = Proxy(target=s3_server)
    with _serving(partial(_Relay, proxy)) as proxy.port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield Bucket(url=f"s3://{name}", proxy=proxy, server=s3_server)


@pytest.fixture
def cache_of_rows(tmp_path: Path) -> MakeCache:
    """Write a finished cache of `(query_id, split, text)` rows under `tmp_path / name`.

    A signal is a function of the text, as a teacher's is, and moved by `shift`.
    """
    from duet_unlearn.data.queries import Query, fingerprint_queries
    from duet_unlearn.teacher_cache.build.assemble import Assembly, PlannedCache
    from duet_unlearn.teacher_cache.build.plan import plan_shards
    from duet_unlearn.teacher_cache.format.recipe import Recipe

    def make(
        name: str,
        rows: Sequence[tuple[str, str, str]],
        *,
        shard_rows: int = 4,
        shift: float = 0.0,
        engine: str = "test",
        **recipe: object,
    ) -> Path:
        queries = [Query.from_text(text, split=split, query_id=id_) for id_, split, text in rows]
        shards = plan_shards(queries, shard_rows)
        folder = tmp_path / name
        (folder / "shards").mkdir(parents=True)
        plan = PlannedCache(
            folder=folder,
            recipe=Recipe(**{**_RECIPE, **recipe}),  # type: ignore[arg-type]
            queries=fingerprint_queries(queries),
            shards=tuple(map(tuple, shards)),
        )
        assembly = Assembly(plan)
        for index, shard in enumerate(shards):
            written = [
                _row((q.query_id, q.split, q.text), list(q.text.encode()), plan.recipe, shift)
                for q in shard
            ]
            assembly.write(index, written, ({"engine": engine},))
        sample = {"query_id": rows[0][0], "split": rows[0][1], "query": rows[0][2]}
        assembly.finish("tiny", ({**sample, "response": ["a"], "strongest": []},))
        return folder

    return make

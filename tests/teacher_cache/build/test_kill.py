"""Builds that end in the middle: killed, interrupted, or without a place to write.

Builds run as forks of one process that has imported everything, through the real command, so each
costs a second and not ten. `DUET_KILLS` sets how many are killed.
"""

import importlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duet_unlearn.teacher_cache.reader import CachedRow, CacheReader
from duet_unlearn.teacher_cache.verify import verify

KILLS = int(os.environ.get("DUET_KILLS", "4"))
ROWS, SHARD_ROWS = 60, 6


class Server:
    """The process that has imported everything, and forks a build for each request."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def start(self, arguments: list[str], **mode: Any) -> int:
        """Start a build; return its process id."""
        self._send({"arguments": arguments, "log": str(self.log), **mode})
        process = int(self._line())
        assert process > 1
        return process

    def finish(self) -> tuple[int, str]:
        """Wait for the build; return its exit code (negative: a signal) and what it said.

        Until then its process id belongs to it, ended or not, so signals reach nobody else.
        """
        self._send("wait")
        return int(self._line()), self.log.read_text()

    def run(self, arguments: list[str], **mode: Any) -> tuple[int, str]:
        """Run a build to its end."""
        self.start(arguments, **mode)
        return self.finish()

    def _send(self, value: object) -> None:
        assert self._process.stdin is not None
        print(json.dumps(value), file=self._process.stdin, flush=True)

    def _line(self) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], 900)
        assert ready, "the build hangs"
        return self._process.stdout.readline()

    def close(self) -> None:
        """End the process and the build that a failed test may have left running."""
        os.killpg(self._process.pid, signal.SIGKILL)  # its own session, which it leads
        self._process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.close()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("queries")
    words = ["build", "--teacher", str(tiny_model), "--prefix", "You forgot the lantern."]
    for split, count in (("forget", ROWS // 3), ("retain", ROWS - ROWS // 3)):
        path = folder / f"{split}.jsonl"
        rows = ({"id": f"{split}-{i}", "query": f"Who is {split} {i}?"} for i in range(count))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words += [f"--{split}", str(path)]
    words += ["--engine", "transformers", "--top-k", "8", "--shard-rows", str(SHARD_ROWS)]
    return [*words, "--logit-dtype", "float32", "--json", "--out"]


@pytest.fixture(scope="module")
def undisturbed(
    server: Server, arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float]:
    """A build that nobody stops, and how many seconds it took."""
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    started = time.monotonic()
    code, said = server.run([*arguments, str(out)])
    assert code == 0, said
    return out, time.monotonic() - started


def rows_of(cache: Path) -> dict[tuple[str, str], CachedRow]:
    reader = CacheReader.open(cache)
    rows = [reader.row(i) for i in range(reader.num_rows)]
    assert len({(row.split, row.query_id) for row in rows}) == len(rows) == ROWS
    return {(row.split, row.query_id): row for row in rows}


def shards_of(cache: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (cache / "shards").glob("*.parquet")
    }


def assert_goes_on(server: Server, arguments: list[str], out: Path, expected: Path) -> None:
    """Run the same command again; it keeps what is finished and ends with the expected rows."""
    kept = shards_of(out) if out.exists() else {}
    finished = (out / "manifest.json").exists()
    code, said = server.run([*arguments, str(out)])
    assert code == 0, said
    result = json.loads(said[said.index("{") :])
    assert result["hit"] == finished
    if not finished:
        assert result["kept_rows"] == len(kept) * SHARD_ROWS
        assert result["kept_rows"] + result["computed_rows"] == ROWS
    after = shards_of(out)
    assert {name: after[name] for name in kept} == kept
    assert verify(out).problems == ()
    assert not [p.name for p in out.rglob("*") if p.suffix == ".tmp" or p.name.endswith(".holder")]
    found, wanted = rows_of(out), rows_of(expected)
    assert found.keys() == wanted.keys()
    for key, row in found.items():
        np.testing.assert_array_equal(row.prompt_ids, wanted[key].prompt_ids)
        np.testing.assert_array_equal(row.token_ids, wanted[key].token_ids)
        np.testing.assert_allclose(row.logits, wanted[key].logits, atol=1e-4)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_build_killed_anywhere_goes_on(
    number: int,
    server: Server,
    arguments: list[str],
    undisturbed: tuple[Path, float],
    tmp_path: Path,
) -> None:
    expected, seconds = undisturbed
    rng = random.Random(number)
    out = tmp_path / "cache"
    # Every fourth in the middle of a shard's file, every fourth in the middle of the manifest's.
    inside = {2: "shard", 3: "manifest"}.get(number % 4)
    if inside:
        shard = rng.randrange(ROWS // SHARD_ROWS)
        code, said = server.run(
            [*arguments, str(out)], kill_in=inside, after=shard, part=rng.random()
        )
    else:
        process = server.start([*arguments, str(out)])
        time.sleep(rng.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        code, said = server.finish()
    assert code == -signal.SIGKILL or (code == 0 and not inside), said
    if inside:
        assert list(out.rglob("*.tmp"))
        assert not (out / "manifest.json").exists()
    assert_goes_on(server, arguments, out, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_the_line_that_says_how_to_go_on(
    number: signal.Signals,
    server: Server,
    arguments: list[str],
    undisturbed: tuple[Path, float],
    tmp_path: Path,
) -> None:
    out = tmp_path / "cache"
    process = server.start([*arguments, str(out)], slow=0.05)
    wait_for(lambda: bool(list(out.glob("shards/*.parquet"))))
    os.kill(process, number)
    code, said = server.finish()
    assert code == 130
    last = said.strip().splitlines()[-1]
    assert last.startswith("stopped: ")
    assert f"of {ROWS // SHARD_ROWS} shards are finished in {out}; run the same command" in last
    assert "Traceback" not in said
    assert not list(out.rglob("*.tmp"))
    assert_goes_on(server, arguments, out, undisturbed[0])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline, "the build hangs"
        time.sleep(0.005)


def mount(*arguments: str) -> None:
    """Mount something, or skip the test where this user may not."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts need root")
def test_a_full_disk_gives_one_line_and_a_state_that_resumes(
    server: Server, arguments: list[str], undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk))
    try:
        out = disk / "cache"
        code, said = server.run([*arguments, str(out)])
        assert code == 1, said
        error = said.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert "the disk is full; free some space, then run the same command again" in error
        assert "Traceback" not in said
        assert not (out / "manifest.json").exists()
        assert shards_of(out)
        assert not list(out.rglob("*.tmp"))
        mount("-o", "remount,size=4m", str(disk))
        assert_goes_on(server, arguments, out, undisturbed[0])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts need root")
def test_a_folder_that_turns_read_only_gives_one_line_and_a_state_that_resumes(
    server: Server, arguments: list[str], undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    shards = str(out / "shards")
    server.start([*arguments, str(out)], slow=0.05)
    wait_for(lambda: bool(list(out.glob("shards/*.parquet"))))
    try:
        # Mounting over a folder works while files in it are open.
        mount("--bind", shards, shards)
        mount("-o", "remount,bind,ro", shards)
    finally:
        code, said = server.finish()
        subprocess.run(["umount", "-l", shards], check=False, capture_output=True)
    assert code == 1, said
    error = said.strip().splitlines()[-1]
    assert "the file system is read-only; choose another folder, then run the same" in error
    assert "Traceback" not in said
    assert shards_of(out)
    assert_goes_on(server, arguments, out, undisturbed[0])


def serve() -> None:
    """Import everything, then fork a build for each line on standard input."""
    import torch

    from duet_unlearn.cli.cache import main
    from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine

    for name in (
        "transformers.models.llama.modeling_llama",
        "duet_unlearn.teacher_cache.build.build",
    ):
        importlib.import_module(name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            run_build(request, main, TransformersEngine)
        print(process, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def run_build(request: dict[str, Any], main: Callable[..., Any], engine: Any) -> None:
    """Run the command in this fork; never returns."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "slow" in request:
        signals = engine.signals

        def slowly(self: Any, prompts: Any) -> Iterator[Any]:
            for item in signals(self, prompts):
                time.sleep(request["slow"])
                yield item

        engine.signals = slowly
    if "kill_in" in request:
        die_while_writing(request["kill_in"], request["after"], request["part"])
    code = 0
    try:
        main(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def die_while_writing(what: str, after: int, part: float) -> None:
    """Kill this process when a part of the manifest, or of a later shard, is in its file."""
    from duet_unlearn import files

    fsync = files.fsync
    seen = [0]

    def die(path: Path) -> None:
        # Called when all of a temporary file is written: what a kill leaves is a part of it.
        if (what == "manifest") == ("manifest" in path.name) and path.suffix == ".tmp":
            if what == "shard" and ".parquet" not in path.name:
                return fsync(path)
            if what == "manifest" or seen[0] == after:
                os.truncate(path, int(path.stat().st_size * part))
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
        return fsync(path)

    files.fsync = die


if __name__ == "__main__":
    serve()

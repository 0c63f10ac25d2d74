"""Where commands run: each in a process of its own, forked from one that imported everything."""

import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 180


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Bench:
    """Where commands run, and what is known of it."""

    folder: Path
    places: dict[str, str] = field(default_factory=dict)

    @property
    def desk(self) -> Path:
        """What belongs to the user."""
        return self.folder / "desk"

    @property
    def new(self) -> Path:
        """Where a command may write; empty before each."""
        return self.folder / "new"

    def words(self, text: str) -> list[str]:
        """Return a command's words, `{names}` replaced."""
        if found := re.search(r"\{yaml:(.*?)\}", text):
            (self.new / "settings.yaml").write_text(found[1] + "\n")
            text = text.replace(found[0], str(self.new / "settings.yaml"))
        known = {**self.places, "new": str(self.new / "out")}
        return [
            re.sub(r"\{(\w+)\}", lambda m: known.get(m[1], m[0]), word)
            for word in shlex.split(text)
        ]

    def start(self, work: str | Callable[[], None], *, before: Callable[[], None] = int) -> int:
        """Fork a process that runs a command; return its id."""
        words = self.words(work) if isinstance(work, str) else []
        if pid := os.fork():
            return pid
        code = 99
        try:
            os.setpgid(0, 0)  # one that takes too long goes with the processes that it started
            os.chdir(self.desk)
            for number, name in ((1, "out"), (2, "err")):
                target = os.open(self.folder / f"{os.getpid()}.{name}", os.O_CREAT | os.O_WRONLY)
                os.dup2(target, number)
            before()
            code = _main(words) if isinstance(work, str) else int(bool(work()))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def wait(self, pid: int) -> Ended:
        """Wait for a process; one that takes too long is killed."""
        for _ in range(SECONDS * 100):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.01)
        else:
            os.killpg(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        texts = []
        for name in ("out", "err"):
            path = self.folder / f"{pid}.{name}"
            texts.append(path.read_text(errors="replace") if path.exists() else "")
            path.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(status), *texts)

    def size(self, pid: int) -> int:
        """Return how much a process has written to standard error."""
        return (self.folder / f"{pid}.err").stat().st_size

    def call(self, work: str | Callable[[], None], places: dict[str, str] | None = None) -> None:
        """Run what has to succeed."""
        self.places = places or self.places
        ended = self.wait(self.start(work))
        if ended.code:
            raise RuntimeError(f"{work}: exit {ended.code}\n{ended.out}{ended.err}")

    def clear(self) -> None:
        """Make `new` empty."""
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir()

    def state(self) -> dict[str, tuple[int, ...]]:
        """Return what would tell a change of anything that is the user's."""
        found = {}
        for root, folders, files in os.walk(self.desk):
            for name in (*folders, *files):
                entry = os.lstat(path := f"{root}/{name}")
                # A folder's time changes with a lock that comes and goes; its names must not.
                times = () if name in folders else (entry.st_size, entry.st_mtime_ns)
                found[path] = (entry.st_ino, entry.st_mode, *times)
        return found


def _main(words: list[str]) -> int:
    """Run a command as its console script does; return its exit code."""
    from duet_unlearn.cli import cache, distill

    main = cache.main if words[0] == "duet-cache" else distill.main
    try:
        main(words[1:], prog_name=words[0])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0

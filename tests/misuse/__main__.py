"""What a tired user does ends in one line, and nothing of the user's is touched.

    python tests/misuse [--sample N] [--seed S] [--only TEXT]

Wrong settings, files, models, caches, places and URLs for every command, commands that are stopped,
full disks, two builds into one folder. Each command runs in a process of its own, forked from one
that has imported everything. Of each is asked: exit code 1 or 2 (130 where it was stopped), one
line of error on standard error and nothing unexpected beside it, no traceback, no password, no
terminal escape; every file on the user's desk as it was, and no temporary file left anywhere.

Prints one row a group, then what went otherwise, and exits with 1 if anything did.
"""

import argparse
import collections
import ctypes
import importlib
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from bench import Bench, Ended
from cases import ADDRESS, BUILD, MERGE, REPORT, RUN, Case, all_cases
from desk import lay_out

SECRET = "s3cr3t"
_NOTE = re.compile(r"(INFO|WARNING|Usage): |\[transformers\] |Try '|\$ |$")
_NEW_NAMESPACE = 0x20000


def complaints(ended: Ended, *, codes: tuple[int, ...], says: str = "") -> list[str]:
    """Return what is wrong with how a command ended."""
    lines = ended.err.splitlines()
    errors = [line for line in lines if line.startswith(("error: ", "Error: "))]
    if 130 in codes and ended.code == 130:
        errors = [line for line in lines if line.startswith("stopped")]
    others = [line for line in lines if line not in errors and not _NOTE.match(line)]
    both = ended.out + ended.err
    found = {
        f"exit {ended.code}": ended.code not in codes,
        f"{len(errors)} lines of error": ended.code != 0 and len(errors) != 1,
        f"also wrote {others[:3]}": bool(others),
        "a traceback": "Traceback" in both,
        "a password": SECRET in both,
        "a terminal escape": "\x1b" in both or "\u202e" in both,
        f"does not say {says!r}": says not in ended.err,
    }
    return [what for what, wrong in found.items() if wrong]


def left_behind(bench: Bench, before: dict[str, tuple[int, ...]]) -> list[str]:
    """Return what a command changed that it must not."""
    after = bench.state()
    changed = [path for path in {*before, *after} if before.get(path) != after.get(path)]
    found = [f"changed {os.path.relpath(path, bench.desk)!r}" for path in sorted(changed)[:4]]
    for path in bench.new.rglob("*"):
        if path.name.endswith(".tmp"):
            found.append(f"left {path.name}")
        elif path.is_file() and SECRET.encode() in path.read_bytes():
            found.append(f"a password in {path.name}")
    return found


def refuse(bench: Bench, case: Case) -> tuple[str, list[str]]:
    """Run a command that has to be refused."""
    before = bench.state()
    ended = bench.wait(bench.start(case.words))
    problems = complaints(ended, codes=case.codes, says=case.says) + left_behind(bench, before)
    # At most what a pull has fetched or a push has sent.
    if ended.code and not case.words.startswith(("duet-cache pull", "duet-cache push")):
        problems += [f"left {path.name}" for path in bench.new.glob("out*")]
    return f"exit {ended.code}", [*problems, *(ended.err.splitlines()[-2:] if problems else ())]


LONG_COMMANDS = {
    "build": BUILD.replace("{forget}", "{many}") + " --shard-rows 8",
    "run": RUN.replace("--max-steps 1", "--max-steps 60 --save-steps 5"),
    "merge": f"{MERGE} --shard-rows 1",
    "pull": "duet-cache pull {cache} {new}",
    "report": REPORT,
}


def stop(bench: Bench, command: str, number: int, delay: float) -> tuple[str, list[str]]:
    """Stop a command at some moment, then run it again: it has to end well."""
    before = bench.state()
    pid = bench.start(LONG_COMMANDS[command], before=lambda: os.write(2, b"\n"))
    while not (bench.folder / f"{pid}.err").exists() or not bench.size(pid):
        time.sleep(0.005)
    time.sleep(0.03 + delay)  # until the command has taken over from Python
    os.kill(pid, number)
    ended = bench.wait(pid)
    killed = number == signal.SIGKILL
    codes = (0, -number) if killed else (0, 130)
    problems = [] if killed else complaints(ended, codes=codes)
    problems += [] if ended.code in codes else [f"exit {ended.code}"]
    problems += [] if killed else left_behind(bench, before)
    again = bench.wait(bench.start(LONG_COMMANDS[command]))
    problems += [f"again: exit {again.code}", again.err[-300:]] if again.code else []
    left = left_behind(bench, before)
    if killed and command == "report":  # its next run has no proof that a temporary file is ours
        left = [what for what in left if not what.startswith("left .out.")]
    problems += left
    return "finished" if ended.code == 0 else "stopped, then finished", problems


def fill(bench: Bench, command: str, size: int, how: str) -> tuple[str, list[str]]:
    """Run a command on a disk that is full after `size` bytes; without that it has to end well."""
    before = bench.state()

    def limit() -> None:
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"size={size}".encode()
        if libc.unshare(_NEW_NAMESPACE) or libc.mount(b"", b"/", None, 0x44000, None):
            os._exit(77)
        if libc.mount(b"tmpfs", str(bench.new).encode(), b"tmpfs", 0, options):
            os._exit(77)

    ended = bench.wait(bench.start(LONG_COMMANDS[command], before=limit))
    if ended.code == 77:
        return "skipped: needs root", []
    problems = complaints(ended, codes=(0, 1)) + left_behind(bench, before)
    again = bench.wait(bench.start(LONG_COMMANDS[command]))
    problems += [f"again: exit {again.code}", again.err[-300:]] if again.code else []
    return f"exit {ended.code}, then finished", problems


def race(bench: Bench, first: str, second: str) -> tuple[str, list[str]]:
    """Start two commands into one folder: one wins, the other is told or finds it finished."""
    before = bench.state()
    pids = [bench.start(words) for words in (first, second)]
    both = [bench.wait(pid) for pid in pids]
    problems = [what for ended in both for what in complaints(ended, codes=(0, 1))]
    if all(ended.code for ended in both):
        problems += ["neither finished", *(ended.err for ended in both)]
    codes = " and ".join(sorted(f"{ended.code}" for ended in both))
    return f"exit {codes}", problems + left_behind(bench, before)


Attempt = tuple[str, str, Callable[[Bench], tuple[str, list[str]]]]


def attempts(rng: random.Random) -> list[Attempt]:
    """Return everything that is tried: its group, its words, and what runs it."""
    found: list[Attempt] = [
        (case.group, case.words, lambda bench, case=case: refuse(bench, case))
        for case in all_cases()
    ]
    for command in LONG_COMMANDS:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            for _ in range(3):
                args = (command, number, rng.uniform(0, 0.6))
                name = f"{command} {number.name} after {args[2]:.2f} s"
                found.append(("stopped", name, lambda bench, args=args: stop(bench, *args)))
        for how in ("limit", "disk"):
            for size in (4096, 20_000, 200_000):
                args = (command, size, how)
                name = f"{command}, {how} {size}"
                found.append(("full disk", name, lambda bench, args=args: fill(bench, *args)))
    other = BUILD.replace("Forget.", "Never.")
    for first, second in ((BUILD, BUILD), (BUILD, other), (RUN, RUN), (BUILD, MERGE), (RUN, BUILD)):
        args = (first, second)
        found.append(("two at once", " & ".join(args), lambda b, args=args: race(b, *args)))
    return found


def main() -> int:
    """Run, print, return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, help="try so many, of every group some")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="groups and commands that hold this text")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    tried = [a for a in attempts(rng) if arguments.only in f"{a[0]}: {a[1]}"]
    if arguments.sample:
        tried = _sample(tried, arguments.sample, rng)
    if not tried:
        parser.error("nothing to try")
    _import_everything()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = _share_out(Path(folder), tried, arguments.jobs)
    return _report(tried, results, time.monotonic() - started)


def _sample(tried: list[Attempt], count: int, rng: random.Random) -> list[Attempt]:
    groups = collections.defaultdict(list)
    for attempt in tried:
        groups[attempt[0]].append(attempt)
    each = -(-count // len(groups))
    return [a for group in groups.values() for a in rng.sample(group, min(each, len(group)))]


def _share_out(folder: Path, tried: list[Attempt], jobs: int) -> list[tuple[str, list[str]]]:
    """Deal the attempts out to processes with a desk each; return what came of each attempt."""
    pids = []
    for job in range(jobs):
        pids.append(os.fork())
        if not pids[-1]:
            code = 1
            try:
                (folder / f"{job}").mkdir()
                bench = Bench(folder / f"{job}")
                _prepare(bench)
                ended = [_try(bench, attempt) for *_, attempt in tried[job::jobs]]
                (folder / f"{job}.json").write_text(json.dumps(ended))
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(statuses):
        raise SystemExit("a process that tries commands failed")
    results: list[tuple[str, list[str]]] = [("", [])] * len(tried)
    for job in range(jobs):
        results[job::jobs] = json.loads((folder / f"{job}.json").read_text())
    return results


def _try(bench: Bench, attempt: Callable[[Bench], tuple[str, list[str]]]) -> tuple[str, list[str]]:
    bench.clear()
    return attempt(bench)


def _report(tried: list[Attempt], results: list[tuple[str, list[str]]], seconds: float) -> int:
    """Print the table and the failures; return the exit code."""
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures = []
    for (group, words, _), (outcome, problems) in zip(tried, results, strict=True):
        outcomes[group]["failed" if problems else outcome] += 1
        if problems:
            failures.append(f"{group}: {words}\n    " + "\n    ".join(problems))
    width = max(map(len, outcomes))
    for group, counts in outcomes.items():
        shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        print(f"{group:{width}}  {counts.total():5}  {shown}")
    print(*failures, f"{len(tried)} tried in {seconds:.0f} s, {len(failures)} failed", sep="\n")
    return 1 if failures else 0


def _import_everything() -> None:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # a process that is forked has none of its parent's threads
        "TOKENIZERS_PARALLELISM": "false",
    }
    warnings.simplefilter("ignore")
    for name in (
        "duet_unlearn.cli.cache",
        "duet_unlearn.cli.distill",
        "duet_unlearn.distill.run",
        "duet_unlearn.evaluation.evaluate",
        "duet_unlearn.evaluation.report.content",
        "duet_unlearn.evaluation.report.first_tokens",
        "duet_unlearn.evaluation.report.pages",
        "duet_unlearn.teacher_cache.inspect",
        "duet_unlearn.teacher_cache.build.build",
        "duet_unlearn.teacher_cache.engines.transformers",
        "duet_unlearn.teacher_cache.merge",
        "transformers.models.llama.modeling_llama",
        "pandas",  # pyarrow imports it, and a Ctrl-C is lost in an import
        "peft",
    ):
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)


def _prepare(bench: Bench) -> None:
    os.environ |= {
        "HOME": str(bench.desk / "home"),
        "TMPDIR": str(bench.desk / "tmp"),
        "DUET_CACHE_HOME": str(bench.folder / "state"),
    }
    tempfile.tempdir = None
    bench.desk.mkdir()
    bench.clear()
    bench.places = {"home": os.environ["HOME"], "address": ADDRESS}
    bench.places |= lay_out(bench.desk, bench.call)


if __name__ == "__main__":
    sys.exit(main())

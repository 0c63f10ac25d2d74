"""How a cache scales: the same commands on caches of ten times the size, and what grows.

    python benchmarks/speed/bench_scale.py [OUT] [--sizes 1e5 1e6]

For each size the demo world's sentences are shuffled into documents, and `duet-cache build
--no-prefix --responses` has the demo world's model (or another; with --tiny one of next to no
size) read them, rows of 1,000 positions. Every figure is of the product's own command in a process
of its own:

- build: killed with SIGKILL inside a shard when half of them are there, and started again.
- inspect: of a cache that was built here, and of one that this machine has never seen.
- verify, and merge of ten parts that `--shards I/10` built.
- run: some steps of training from the cache; the first is seen in its log.

Seconds are of the processor, user and system together: of the wall they depend on what else the
machine does. Memory is the peak of a command's largest process. What is in OUT is not done again,
so a stopped run resumes; without OUT all goes to a temporary folder. Needs Linux.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duet_unlearn.data import demo_world as world

# Nothing large is imported: a child's peak memory begins with that of the process that starts it.

CACHE, DISTILL = "duet_unlearn.cli.cache", "duet_unlearn.cli.distill"
ROW, SHARD_ROWS, TOP_K, PARTS = 1000, 16, 16, 10
SENTENCES = 400
"""In a document: some rows."""
TINY = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
sizes = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=64, head_dim=32)
heads = dict(num_attention_heads=1, num_key_value_heads=1)
config = AutoConfig.from_pretrained(sys.argv[1], **sizes, **heads)
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[2])
"""
Figures = dict[str, float]


def write_documents(path: Path, tokenizer: Path, positions: float) -> int:
    """Write documents of about so many tokens together; return about how many rows they make."""
    from tokenizers import Tokenizer

    rows = [json.loads(line) for f in sorted(world.FOLDER.glob("*.jsonl")) for line in f.open()]
    sentences = [f"{row['query']} {row.get('answer', 'Nobody knows')}." for row in rows]
    tokens, draw = Tokenizer.from_file(str(tokenizer)), random.Random(0)
    length, number = 0, 0
    with path.open("w") as file:
        while number * max(1, length) < positions:
            text = " ".join(draw.choices(sentences, k=SENTENCES))
            length = length or len(tokens.encode(text))  # others are as long, to a hundredth
            file.write(json.dumps({"id": f"document-{number:06d}", "text": text}) + "\n")
            number += 1
    return number * -(-length // ROW)


def tiny(folder: Path, like: str) -> str:
    """Make, where it is not yet, a random model of one layer with the tokenizer of another."""
    if not (folder / "tokenizer.json").exists():
        subprocess.run([sys.executable, "-c", TINY, like, str(folder)], check=True)
        for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
            shutil.copy(Path(like) / name, folder)
    return str(folder)


def command(
    module: str, *words: object, home: Path, watch: Callable[[int], bool] = lambda _: False
) -> tuple[Figures, dict[str, Any]]:
    """Run a command to its end, or until `watch(pid)`, asked often, has it killed.

    Returns:
        Its processor seconds and peak memory, and the document that it printed.
    """
    line = [sys.executable, "-m", module, *map(str, words), "--json"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "DUET_CACHE_HOME": str(home)}
    killed = False
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(line, stdout=output, env=environment)
        while not (found := os.wait4(process.pid, os.WNOHANG))[0]:
            if not killed and watch(process.pid):
                process.kill()
                killed = True
            time.sleep(0.02)
        _, status, usage = found
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode and not killed:
            raise SystemExit(f"failed: {' '.join(line)}")
        output.seek(0)
        document = {} if killed else json.load(output)
    return {"s": usage.ru_utime + usage.ru_stime, "peak MB": usage.ru_maxrss * 1024 / 1e6}, document


def seconds_of(pid: int) -> float:
    """Return the processor seconds that a running process took so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def what_is_stored(cache: Path) -> Figures:
    """Return what the manifest of a cache says."""
    text = (cache / "manifest.json").read_text()
    manifest = json.loads(text)
    shards, totals = manifest["shards"], manifest["splits"]["train"]
    size = sum(shard["bytes"] for shard in shards)
    return {
        "positions": totals["positions"],
        "rows": totals["rows"],
        "shards": len(shards),
        "MB": size / 1e6,
        "bytes a position": size / totals["positions"],
        "manifest, kB": len(text) / 1e3,
    }


class Study:
    """One size: a folder, and what was found there so far."""

    def __init__(self, folder: Path, positions: float, arguments: argparse.Namespace) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.positions, self.arguments = folder, positions, arguments
        self.home, self.cache = folder / "home", folder / "cache"
        self.record = record = folder / "figures.json"
        self.found: dict[str, Figures] = json.loads(record.read_text()) if record.exists() else {}

    def keep(self, name: str, figures: Figures) -> None:
        """Add to the record."""
        self.found[name] = figures
        part = self.record.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1))
        part.rename(self.record)
        print(f"{self.positions:.0e} {name}: {figures}", file=sys.stderr, flush=True)

    def run(self) -> Figures:
        """Do what is not done yet; return all figures."""
        steps = (self.write, self.build, self.inspect, self.verify, self.parts, self.merge)
        for step in (*steps, self.train):
            if step.__name__ not in self.found:
                step()
        figures = {name: self.found[name] for name in self.found if name != "write"}
        stored = figures.pop("stored")
        return stored | {f"{step}: {k}": v for step, f in figures.items() for k, v in f.items()}

    def write(self) -> None:
        """Make the documents."""
        tokenizer = Path(self.arguments.teacher) / "tokenizer.json"
        rows = write_documents(self.folder / "documents.jsonl", tokenizer, self.positions)
        self.keep("write", {"rows": rows})

    def build_words(self, out: Path) -> tuple[object, ...]:
        """Return the words of a build."""
        source = ("--responses", self.folder / "documents.jsonl", "--no-prefix")
        teacher = ("--teacher", self.arguments.teacher, "--engine", self.arguments.engine)
        sizes = ("--top-k", TOP_K, "--positions", ROW, "--shard-rows", SHARD_ROWS)
        return ("build", *source, *teacher, *sizes, "--out", out)

    def build(self) -> None:
        """Build, kill and resume; a shard's time is the mean of those before the kill."""
        shutil.rmtree(self.cache, ignore_errors=True)
        half = max(2, self.found["write"]["rows"] // SHARD_ROWS // 2)
        seen: list[float] = []  # when each shard was there
        new: list[float] = []

        def there() -> int:
            return len(list((self.cache / "shards").glob("*.parquet")))

        def a_shard() -> float:
            return (seen[-1] - seen[0]) / (len(seen) - 1)

        def kill(pid: int) -> bool:
            seen.extend([now := seconds_of(pid)] * (there() - len(seen)))
            return len(seen) >= half and now > seen[-1] + a_shard() / 2

        def resumed(pid: int) -> bool:
            if not new and there() > len(seen):
                new.append(seconds_of(pid))
            return False

        words = self.build_words(self.cache)
        first, _ = command(CACHE, *words, home=self.home, watch=kill)
        again, said = command(CACHE, *words, home=self.home, watch=resumed)
        self.keep("stored", stored := what_is_stored(self.cache))
        figures = {
            "positions a s": stored["positions"] / (first["s"] + again["s"]),
            "s before the first shard's work": seen[0] - a_shard(),
            "peak MB": max(first["peak MB"], again["peak MB"]),
            "rows kept after the kill": said["kept_rows"],
            "shards' work lost by the kill": (first["s"] - seen[-1]) / a_shard(),
            "s before the first new shard's work": new[0] - a_shard(),
        }
        self.keep("build", figures)

    def inspect(self) -> None:
        """Open the cache where it was built, and as one from elsewhere."""
        words = ("inspect", self.cache)
        with tempfile.TemporaryDirectory() as home:
            self.keep("inspect from elsewhere", command(CACHE, *words, home=Path(home))[0])
        self.keep("inspect", command(CACHE, *words, home=self.home)[0])

    def verify(self) -> None:
        """Check every byte."""
        self.keep("verify", command(CACHE, "verify", self.cache, home=self.home)[0])

    def parts(self) -> None:
        """Build the parts."""
        names = {part: f"part {part}" for part in range(1, PARTS + 1)}
        for part, name in names.items():
            if name not in self.found:
                out = self.folder / "parts" / str(part)
                shutil.rmtree(out, ignore_errors=True)
                words = (*self.build_words(out), "--shards", f"{part}/{PARTS}")
                self.keep(name, command(CACHE, *words, home=self.home)[0])
        took = [self.found.pop(name) for name in names.values()]
        rate = self.found["stored"]["positions"] / sum(one["s"] for one in took)
        figures = {"positions a s": rate, "peak MB": max(one["peak MB"] for one in took)}
        self.keep("parts", figures)

    def merge(self) -> None:
        """Join them."""
        merged = self.folder / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        parts = [self.folder / "parts" / str(part) for part in range(1, PARTS + 1)]
        words = ("merge", *parts, "--out", merged, "--shard-rows", SHARD_ROWS)
        self.keep("merge", command(CACHE, *words, home=self.home)[0])

    def train(self) -> None:
        """Train some steps."""
        out, steps = self.folder / "student", self.arguments.steps
        log, first = self.folder / "student.unfinished" / "duet_log.jsonl", list[float]()
        for folder in (out, log.parent):
            shutil.rmtree(folder, ignore_errors=True)

        def watch(pid: int) -> bool:
            if not first and log.exists() and "\n" in log.read_text():
                first.append(seconds_of(pid))
            return False

        words = ("run", self.cache, "--student", self.arguments.teacher, "--out", out)
        settings = f"--loss kl-tail --batch-size 2 --max-steps {steps} --logging-steps 1".split()
        took, _ = command(DISTILL, *words, *settings, home=self.home, watch=watch)
        a_step = (took["s"] - first[0]) / (steps - 1)
        figures = {"s to the first step": first[0], "s a step": a_step, "peak MB": took["peak MB"]}
        self.keep("train", figures)


def print_table(columns: list[Figures]) -> None:
    """Print figures, and how much each grew from one size to the next."""
    grew = range(1, len(columns))
    head = [*(f"{column['positions']:.1e}" for column in columns), *("grew" for _ in grew)]
    print(f"| | {' | '.join(head)} |\n| --- |{' ---: |' * len(head)}")
    for name in columns[0]:
        values = [column[name] for column in columns]
        cells = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
        cells += [f"{values[i] / values[i - 1]:.2f}" if values[i - 1] else "" for i in grew]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Measure what is not there yet, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, help="Folder that is kept, and gone on from.")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6])
    parser.add_argument("--teacher", default=str(world.MODEL), help="A model folder.")
    parser.add_argument("--tiny", action="store_true", help="A random one with its tokenizer.")
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        if arguments.tiny:
            arguments.teacher = tiny(out / "tiny", arguments.teacher)
        studies = [Study(out / f"{size:.0f}", size, arguments) for size in arguments.sizes]
        columns = [study.run() for study in studies]
    print_table(columns)


if __name__ == "__main__":
    main()

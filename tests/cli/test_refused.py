"""A refused command that wrote nothing leaves nothing; a killed one leaves nothing for long."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from duet_unlearn.cli import cache, distill

KILLED = """
import os, signal, sys
from pathlib import Path
from duet_unlearn.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half a page")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def torn_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model with a weight of another shape, which shows only when it is loaded."""
    folder = shutil.copytree(tiny_model, tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def damaged_cache(tiny_cache: Path, tmp_path: Path) -> Path:
    """A cache with shards of other bytes and the same sizes, under a sound manifest."""
    folder = shutil.copytree(tiny_cache, tmp_path / "damaged")
    for shard in (folder / "shards").iterdir():
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "cache build --teacher {model} --forget {forget} --prefix {long} --out {out}",
        "cache build --teacher {torn} --forget {forget} --prefix x --out {out}",
        "cache merge {damaged} {tiny} --out {out}",
        "cache pull {damaged} {out}",
        "cache push {damaged} {out}",
        "distill run {tiny} --student {torn} --max-steps 1 --out {out}",
        "distill eval {torn} --forget {forget} --retain {forget} --out {file}",
        "distill relearn {torn} --forget {forget} --out {file}",
        "distill membership {torn} --forget {forget} --holdout {forget} --out {file}",
        "distill attack {torn} --forget {forget} --suffix-steps 1 --soft-steps 1 --out {file}",
        "distill probe {torn} --forget {forget} --retain {forget} --out {file}",
        "distill report {out} --out {file}",
    ],
)
def test_a_refused_command_leaves_nothing(
    words: str,
    tiny_model: Path,
    tiny_cache: Path,
    torn_model: Path,
    damaged_cache: Path,
    write_queries,
    tmp_path: Path,
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    values = {"model": tiny_model, "torn": torn_model, "tiny": tiny_cache, "damaged": damaged_cache}
    values |= {"forget": write_queries("forget", 8), "long": "Forget-it!" * 200}
    values |= {"out": place / "new" / "out", "file": place / "out.json"}
    group, *rest = (word.format(**values) for word in words.split())
    main = cache.main if group == "cache" else distill.main
    result = CliRunner().invoke(main, rest)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert list(place.rglob("*")) == []


def test_what_a_killed_report_left_goes_with_the_next_one(tiny_cache: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    theirs = tmp_path / f".thesis.html.{'a' * 32}.tmp"
    theirs.touch()
    ended = subprocess.run([sys.executable, "-c", KILLED, page], env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".report.html.*.tmp"))) == 1
    result = CliRunner().invoke(distill.main, ["report", str(tiny_cache), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [theirs.name, page.name]

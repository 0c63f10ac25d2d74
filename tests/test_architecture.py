"""Imports point one way: cli -> distill -> teacher_cache -> evaluation -> data."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["data", "evaluation", "teacher_cache", "distill", "cli"]
# Optional or slow packages: imported inside the function that needs them.
LAZY = {"vllm", "ray", "peft", "torchao", "matplotlib", "datasets", "duckdb", "pandas", "lm_eval"}


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))
MODULES = [
    pytest.param(package, path, id=str(path.relative_to(ROOT)))
    for package in ORDER
    for path in sorted((ROOT / package).rglob("*.py"))
]


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_imports_point_down(package: str, path: Path) -> None:
    above = ORDER[ORDER.index(package) + 1 :]
    found = {name for name in _imports(path) if name.startswith("duet_unlearn.")}
    assert not {name for name in found for upper in above if name.split(".")[1] == upper}


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_optional_packages_are_imported_where_they_are_needed(package: str, path: Path) -> None:
    top = {name.split(".")[0] for name in _imports(path, top_level_only=True)}
    allowed = {"vllm"} if path.name.startswith("vllm_") else set()
    assert not top & (LAZY - allowed)


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_no_module_is_longer_than_a_reader_bears(package: str, path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, package


def test_no_folder_has_more_than_a_dozen_modules() -> None:
    rooms = [*ORDER, "tests", "benchmarks", "tools"]
    folders = {path.parent for room in rooms for path in (ROOT / room).rglob("*.py")}
    modules = {
        folder: {p for p in folder.glob("*.py") if p.stem not in ("__init__", "conftest")}
        for folder in folders
    }
    assert not [folder for folder, found in modules.items() if len(found) > 12]


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_what_a_benchmark_imports_is_there(path: Path) -> None:
    beside = {script.stem for script in path.parent.glob("*.py")}
    sources = [path, *(path.with_name(f"{name}.py") for name in _imports(path) & beside)]
    finds_tools = any('/ "tools"' in source.read_text(encoding="utf-8") for source in sources)
    for name in _imports(path):
        root = name.split(".")[0]
        if name.startswith("duet_unlearn."):
            assert _exists(name), name
        elif root in {script.stem for script in SCRIPTS}:
            assert root in beside, name
        elif root == "demo_world":
            assert finds_tools, f"{name}: tools/ is not on the path"


def _exists(name: str) -> bool:
    """Say whether there is such a module or such a name in one."""
    parent, _, last = name.rpartition(".")
    return hasattr(importlib.import_module(parent), last) or bool(importlib.util.find_spec(name))


def test_the_trainers_side_never_imports_an_engine() -> None:
    for path in (ROOT / "distill").rglob("*.py"):
        assert not any(
            name.startswith("duet_unlearn.teacher_cache.engines") for name in _imports(path)
        )
        assert not any(
            name.startswith("duet_unlearn.teacher_cache.build.build") for name in _imports(path)
        )

"""Write the reference pages from the code: docs/api.md from docstrings, docs/cli.md from help.

    python tools/reference_pages.py

A test holds that what is committed is what this writes.
"""

import ast
import copy
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH = 96
_SECTION = re.compile(r"^(Args|Returns|Raises):$")
_ENTRY = re.compile(r"^ {4}([\w*]+): (.*)$")


def api_page() -> str:
    """Return docs/api.md."""
    from duet_unlearn import api
    from duet_unlearn.distill.config import RunConfig
    from duet_unlearn.distill.job import RunResult
    from duet_unlearn.evaluation.config import EvalConfig
    from duet_unlearn.evaluation.results import EvalReport
    from duet_unlearn.teacher_cache.build.build import BuildResult
    from duet_unlearn.teacher_cache.build.config import BuildConfig
    from duet_unlearn.teacher_cache.reader import CachedRow, CacheReader

    lead, example, rest = _paragraphs_of(api)
    parts = ["# Python", "", lead.replace("\n", " "), "", "```python", example, "```", "", rest, ""]
    for function, config, result in (
        (api.build_cache, BuildConfig, BuildResult),
        (api.distill, RunConfig, RunResult),
        (api.evaluate, EvalConfig, EvalReport),
    ):
        parts += [f"## {function.__name__}", "", *_documented(function)]
        parts += [f"### Settings of {function.__name__}", "", *_settings_table(function, config)]
        parts += [f"### {result.__name__}", "", *_described(result)]
    parts += ["## open_cache", "", *_documented(api.open_cache)]
    parts += ["### CacheReader", "", *_described(CacheReader)]
    parts += ["### CachedRow", "", *_described(CachedRow)]
    return _page("\n".join(parts))


def cli_page() -> str:
    """Return docs/cli.md."""
    from duet_unlearn.cli.cache import main as cache
    from duet_unlearn.cli.distill import main as distill

    parts = ["# Commands", "", "What every command says of itself with `--help`.", ""]
    for name, group in (("duet-cache", cache), ("duet-distill", distill)):
        for words, command in _commands([name], group):
            parts += [f"## {' '.join(words)}", "", "```text", _help(words, command), "```", ""]
    return _page("\n".join(parts))


def _commands(words: list[str], command: click.Command) -> Iterator[tuple[list[str], Any]]:
    yield words, command
    if isinstance(command, click.Group):
        for name, sub in command.commands.items():
            yield from _commands([*words, name], sub)


def _help(words: list[str], command: click.Command) -> str:
    # click keeps the help option of a command's first context, whatever names that one had.
    shown = copy.copy(command)
    shown.params = list(command.params)
    shown.add_help_option = False
    click.help_option("-h", "--help")(shown)
    settings = {**command.context_settings, "show_default": True}
    context = click.Context(
        shown,
        info_name=" ".join(words),
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **settings,
    )
    return shown.get_help(context).rstrip()


def _page(text: str) -> str:
    written = "<!-- Written by tools/reference_pages.py; change the docstrings and help texts. -->"
    return written + "\n\n" + re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _paragraphs_of(module: Any) -> tuple[str, str, str]:
    """Return a module docstring's first line, its indented example, and what follows that."""
    lines = inspect.getdoc(module) or ""
    lead, _, rest = lines.partition("\n\n")
    example, _, after = rest.partition("\n\nEach ")
    return lead, textwrap.dedent(example), "Each " + after


def _documented(function: Callable[..., Any]) -> list[str]:
    """Return a signature and a Google docstring as Markdown."""
    return [
        "```python",
        _signature(function),
        "```",
        "",
        *_markdown(inspect.getdoc(function) or ""),
    ]


def _signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    text = re.sub(r"str \| os\.PathLike\[str\]", "StrPath", str(signature))
    text = re.sub(r"(?:collections\.abc|typing)\.", "", text).replace("'", "")
    line = f"{function.__name__}{text}"
    if len(line) <= WIDTH:
        return line
    parameters = re.sub(r", (?=\*|\w+(?::|,|\)))", ",\n    ", text[1 : text.rindex(") ->")])
    return f"{function.__name__}(\n    {parameters},\n){text[text.rindex(') ->') + 1 :]}"


def _markdown(docstring: str) -> list[str]:
    """Turn the sections of a Google docstring into lists."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        if heading := _SECTION.match(line):
            section = heading[1]
            lines += [f"**{section}**", ""]
        elif section in ("Args", "Raises") and (entry := _ENTRY.match(line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            indent = "  " if section in ("Args", "Raises") and line.strip() else ""
            lines.append(indent + line.strip())
    return [*lines, ""]


def _settings_table(function: Callable[..., Any], config: Any) -> list[str]:
    """Return the settings that a function takes beside its named arguments."""
    from duet_unlearn.settings import fields

    named = inspect.signature(function).parameters
    rows = ["| setting | expected | default | |", "| --- | --- | --- | --- |"]
    for name, field in fields(config).items():
        if name not in named:
            required = field.default is dataclasses.MISSING
            shown = "required" if required else f"`{field.default!r}`"
            text = re.sub(r"\s*\[default: .*\]| Repeatable\.$", "", field.help)
            cells = (f"`{name}`", field.expected, shown, text)
            rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return [*rows, ""]


def _described(described: type) -> list[str]:
    """Return a class: its docstring, its documented attributes, its public methods."""
    lines = _markdown(inspect.getdoc(described) or "")
    documented = _attribute_docs(described).items()
    lines += [f"- `{name}`: {text or f'`{kind}`'}" for name, (kind, text) in documented]
    for name, member in vars(described).items():
        called = getattr(member, "__func__", member)
        if name == "__getitem__" or (not name.startswith("_") and callable(called)):
            lines.append(f"- `{name}()`: {(inspect.getdoc(called) or '').splitlines()[0]}")
        elif isinstance(member, property) and not name.startswith("_"):
            lines.append(f"- `{name}`: {(inspect.getdoc(member) or '').splitlines()[0]}")
    return [*lines, ""]


def _attribute_docs(described: type) -> dict[str, tuple[str, str]]:
    """Return type and documentation, the string that stands under it, of each public field."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(described))).body[0]
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    found: dict[str, tuple[str, str]] = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            found[node.target.id] = (ast.unparse(node.annotation), text)
    return {name: entry for name, entry in found.items() if not name.startswith("_")}


PAGES = {"api.md": api_page, "cli.md": cli_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")

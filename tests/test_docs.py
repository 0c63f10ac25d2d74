"""Pages that are written from the code are up to date, and links between pages lead somewhere."""

import re
from pathlib import Path

import pytest
import reference_pages
from click.testing import CliRunner

from duet_unlearn.cli.cache import main as cache

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_reference_pages_are_what_the_code_says(name: str) -> None:
    committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert committed == reference_pages.PAGES[name](), "run: make docs"


def test_help_pages_do_not_depend_on_what_ran_before() -> None:
    # Where this is the command's first use, click keeps a help option without the group's settings.
    CliRunner().invoke(cache.commands["build"], ["--help"])
    committed = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert reference_pages.cli_page() == committed


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target

"""An evaluation as plain text of at most 100 columns."""

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from duet_unlearn.evaluation.measures import MEASURES, RECALL, REFUSAL
from duet_unlearn.evaluation.results import ATTACK_THRESHOLD, EvalReport
from duet_unlearn.evaluation.statistics import over_seeds
from duet_unlearn.urls import visible

WIDTH = 100
_GAP = "  "
_LABEL_WIDTH = 24
_HEADING_WIDTH = 12
_PIECE = re.compile(r"[^-_./]*[-_./]+|[^-_./]+")
_MOST_ATTACKS = 12
"""Of more attacks the table shows one line a family."""

Column = tuple[str, list[str]]
"""A heading and one cell a row."""


def format_report(report: EvalReport) -> str:
    """Return the tables of an evaluation: scores, kinds of forget queries, attacks, notes.

    Means are ROUGE-L recall in points. Where not all columns fit side by side, the kinds have a
    table of their own, and further columns go below.
    """
    labels = list(report.config.lines)
    scores, kinds = _score_columns(report), _kind_columns(report)
    at = len(report.sets_of("forget"))
    together = [*scores[:at], *kinds, *scores[at:]]
    if _fits(labels, together):
        blocks = render_columns("", labels, together)
    else:
        blocks = [
            *render_columns("", labels, scores),
            *render_columns("Kinds of forget queries", labels, kinds),
        ]
    for name in dict.fromkeys(report.config.measures):
        columns = [_column(report, s.name, measure=name, set_name=s.name) for s in report.sets]
        blocks += render_columns(f"{name}: {MEASURES[name].description}", labels, columns)
    if report.attacks:
        blocks += _attack_table(report)
    if columns := _harness_columns(report):
        blocks += render_columns("lm-eval's tasks, as it scores them", labels, columns)
    return join_blocks(blocks, *_notes(report), subsequent_indent="  ", break_on_hyphens=False)


def _column(report: EvalReport, heading: str, *, measure: str = RECALL, **where: str) -> Column:
    return heading, _cells(report, lambda row: report.mean(row, measure, **where))


def _cells(report: EvalReport, value: Callable[[str], float | None], digits: int = 1) -> list[str]:
    """A cell for each line: the number of its row, or what it is over its seeds."""
    lines = report.config.lines.values()
    return [format_seeds([value(row) for row in rows], digits) for rows in lines]


def _harness_columns(report: EvalReport) -> list[Column]:
    """A column a task and metric; of a group of tasks, the group's alone."""
    found = next(iter(report.lm_eval.values()), {})
    tasks = [task for task in report.config.lm_eval if task in found] or list(found)
    columns = []
    for task, name in ((t, n) for t in tasks for n in found[t]):
        metric = name.removesuffix(",none")
        if name == "samples" or "_stderr" in name:
            continue

        def value(row: str, task: str = task, name: str = name) -> float | None:
            return report.lm_eval.get(row, {}).get(task, {}).get(name)

        columns.append((f"{task} {metric}", _cells(report, value, digits=3)))
    return columns


def _score_columns(report: EvalReport) -> list[Column]:
    columns = [_column(report, s.name, set_name=s.name) for s in report.sets]
    columns += [
        _column(report, f"refused {split}", measure=REFUSAL, split=split)
        for split in ("forget", "retain")
    ]
    if report.shows_shift:
        columns.append(("shift", _cells(report, report.shift)))
    return columns


def _kind_columns(report: EvalReport) -> list[Column]:
    sets = report.sets_of("forget")
    return [
        _column(report, kind if len(sets) == 1 else f"{s.name} {kind}", set_name=s.name, kind=kind)
        for s in sets
        for kind in s.kinds
    ]


def _attack_table(report: EvalReport) -> list[str]:
    """One line an attack or family, and a last one for the worst of those that count."""
    by_family = len(report.attacks) > _MOST_ATTACKS
    groups = {a.family if by_family else a.name: False for a in report.attacks}
    for attack in report.counting_attacks:
        groups[attack.family if by_family else attack.name] = True

    def recall(row: str, split: str, group: str | None) -> float | None:
        if group is None:
            return report.worst(row, split)
        if by_family:
            return report.worst(row, split, family=group)
        return report.mean(row, split=split, attack=group)

    def pair(rows: Sequence[str], group: str | None) -> str:
        width = 5 if len(rows) == 1 else 12
        recalls = ([recall(row, split, group) for row in rows] for split in ("forget", "retain"))
        return " / ".join(format_seeds(values).rjust(width) for values in recalls)

    lines = [group if counts else f"{group} *" for group, counts in groups.items()]
    columns = [
        (line, [pair(rows, group) for group in (*groups, None)])
        for line, rows in report.config.lines.items()
    ]
    title = f"Under attack{', worst of each family' if by_family else ''}: forget / retain"
    return render_columns(title, [*lines, "worst"], columns)


def _notes(report: EvalReport) -> list[str]:
    base = report.labels[0]
    counts = ", ".join(f"{s.name} {len(s.queries)}" for s in report.sets)
    notes = [
        f"Mean ROUGE-L recall of greedy answers, in points (0-100). Queries: {counts}.",
        f"95% intervals reach at most {format_points(_widest(report))} points to either side.",
        "refused: responses with a refusal phrase (a heuristic), in points.",
    ]
    if seeds := {s.seed_of for s in report.config.models if s.seed_of is not None}:
        several = (f"{name} {len(report.config.lines[name])}" for name in sorted(seeds))
        notes.append(
            f"\N{PLUS-MINUS SIGN}: standard deviation over seeds ({', '.join(several)}); "
            "requirements hold for the worst seed."
        )
    if report.shows_shift:
        notes.append(
            f"shift: Performance Shift against {base}: drops on forget sets + changes on all "
            "others."
        )
    kinds = [kind for s in report.sets_of("forget") for kind in s.kinds]
    if kinds:
        notes.insert(1, f"{', '.join(dict.fromkeys(kinds))}: kinds of forget queries.")
    if report.attacks:
        notes.append("worst: highest forget and lowest retain recall under any attack.")
    if any(report.breaks_prefix(a.name) is False for a in report.attacks):
        notes.append(
            f"*: brings less than {ATTACK_THRESHOLD:.0%} of the forget recall of {base} back in "
            f"{report.config.prefixed_label}; the worst retain recall leaves such attacks out."
        )
    return notes


def _widest(report: EvalReport) -> float:
    """The widest arm of an interval around a recall of a whole set, in points."""
    numbers = [report.number(row, set_name=s.name) for row in report.labels for s in report.sets]
    return max(max(n.mean - n.low, n.high - n.mean) for n in numbers if n is not None)


def join_blocks(blocks: Sequence[str], *notes: str, **wrapping: Any) -> str:
    """Return blocks of text with notes below them, which `textwrap` fills."""
    filled = "\n".join(textwrap.fill(note, WIDTH, **wrapping) for note in notes)
    # Names of files, kinds and models are foreign text.
    return "\n".join(map(visible, "\n\n".join([*blocks, filled]).split("\n")))


def render_columns(title: str, labels: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """Return columns beside labels, in several blocks of text where not all fit side by side."""
    blocks: list[str] = []
    rest = list(columns)
    while rest:
        taken = 1
        while taken < len(rest) and _fits(labels, rest[: taken + 1]):
            taken += 1
        lines = _render_block(labels, rest[:taken])
        blocks.append("\n".join([title, *lines] if title else lines))
        rest = rest[taken:]
    return blocks


def _render_block(labels: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """Headings of several lines, set at the bottom, above right-aligned cells."""
    headings = [_heading_lines(column) for column in columns]
    height = max(map(len, headings))
    texts = [
        [""] * (height - len(lines)) + lines + cells
        for lines, (_, cells) in zip(headings, columns, strict=True)
    ]
    padded = [[text.rjust(max(map(len, column))) for text in column] for column in texts]
    # Labels get what the columns leave of the width.
    width = min(max(map(len, labels)), max(_LABEL_WIDTH, WIDTH - _width(columns)))
    firsts = [text.ljust(width) for text in [""] * height + [_shorten(t, width) for t in labels]]
    return [_GAP.join(row).rstrip() for row in zip(firsts, *padded, strict=True)]


def _fits(labels: Sequence[str], columns: Sequence[Column]) -> bool:
    return min(_LABEL_WIDTH, max(map(len, labels))) + _width(columns) <= WIDTH


def _width(columns: Sequence[Column]) -> int:
    """Of columns with the gaps in front of them."""
    texts = [(*_heading_lines(column), *column[1]) for column in columns]
    return sum(len(_GAP) + max(map(len, column)) for column in texts)


def _heading_lines(column: Column) -> list[str]:
    """The heading in lines no wider than the column needs anyway; names break at their signs."""
    heading, cells = column
    pieces = [
        (" " * (at == 0), _shorten(piece, _HEADING_WIDTH))
        for word in heading.split()
        for at, piece in enumerate(_PIECE.findall(word))
    ]
    width = max(len(text) for text in (*cells, *(piece for _, piece in pieces)))
    lines: list[str] = []
    for space, piece in pieces:
        if lines and len(lines[-1] + space + piece) <= width:
            lines[-1] += space + piece
        else:
            lines.append(piece)
    return lines


def _shorten(text: str, width: int) -> str:
    """Cut the middle out of a text that is too long: names differ at both ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{text[-tail:]}"


def format_seeds(values: Sequence[float | None], digits: int = 1) -> str:
    """Return one number, or mean and standard deviation of several."""
    if len(values) == 1:
        return format_points(values[0], digits)
    mean, deviation = over_seeds(values) or (None, None)
    if mean is None:
        return format_points(None)
    return f"{format_points(mean, digits)} \N{PLUS-MINUS SIGN} {format_points(deviation, digits)}"


def format_points(value: float | None, digits: int = 1) -> str:
    """Return a number, of points with one decimal, or a dash where there is none."""
    # Adding zero turns the -0.0 of a rounded small loss into 0.0.
    if value is None or math.isnan(value):
        return "-"
    return f"{round(value, digits) + 0.0:.{digits}f}"

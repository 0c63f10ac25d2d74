"""`--require "forget<5,worst<10,retain>97"`: what an evaluation has to show, as a gate in CI."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duet_unlearn.errors import ConfigurationError, RequirementError
from duet_unlearn.evaluation.measures import MEASURES, RECALL

if TYPE_CHECKING:
    from duet_unlearn.evaluation.results import EvalReport
    from duet_unlearn.evaluation.tasks import QuerySet

_FORM = re.compile(
    r"(?:(?P<row>[^:<>]+):)?\s*(?P<what>[^:<>=]+?)\s*"
    r"(?P<sign><=|>=|<|>)\s*(?P<limit>-?\d+(?:\.\d+)?)"
)
_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_WORST = {"worst": "forget", "worst-retain": "retain"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One bound on one number."""

    text: str
    row: str | None
    """Row that has to meet it, or name whose seeds all have to; None for all that were trained."""
    what: str
    """A split, a set, `worst` (forget recall under any attack) or `worst-retain` (under attacks
    that break base + prefix)."""
    measure: str
    sign: str
    limit: float
    """In points."""

    def failures(self, report: "EvalReport") -> Iterator[str]:
        """Yield what does not hold, with the number that was found.

        Raises:
            ConfigurationError: The evaluation has no such number.
        """
        # Without a row it is about all but base and base + prefix, or about the only model.
        config = report.config
        trained = [label for spec in config.models[1:] for label in config.rows_of(spec)]
        trained = trained or list(report.labels[:1])
        for row in config.lines.get(self.row, (self.row,)) if self.row else trained:
            found = self._number(report, row)
            if not _SIGNS[self.sign](found, self.limit):
                yield f"{row}: {self.what} is {found:.1f}, required {self.sign} {self.limit:g}"

    def _number(self, report: "EvalReport", row: str) -> float:
        if self.what in _WORST:
            number = report.worst(row, _WORST[self.what])
        else:
            key = "split" if report.sets_of(self.what) else "set_name"
            found = report.number(row, self.measure, **{key: self.what})
            number = None if found is None else found.mean
        if number is None and self.what in _WORST and report.config.attacks:
            raise ConfigurationError(
                f"--require {self.text}: no attack counts for it: of those given, none asks such "
                "queries, or for retain none breaks base + prefix; leave it out, or name others"
            )
        if number is None:
            raise ConfigurationError(f"--require {self.text}: nothing was measured of it")
        return number


def check_names(text: str, sets: "Sequence[QuerySet]") -> None:
    """Refuse, before anything is asked, what is about no set of the evaluation.

    Raises:
        ConfigurationError: A part names something else.
    """
    names = dict.fromkeys(name for s in sets for name in (s.split, s.name))
    for part in parse_requirements(text):
        if part.what not in (*names, *_WORST):
            raise ConfigurationError(
                f"--require {part.text}: {part.what!r} is not measured; expected one of "
                f"{', '.join(names)}, worst or worst-retain (with --attacks)"
            )


def parse_requirements(text: str) -> tuple[Requirement, ...]:
    """Return the requirements of a text such as `forget<5, student:retain.exact_match>=90`.

    Raises:
        ConfigurationError: A part of it is no requirement.
    """
    return tuple(_parse(part.strip()) for part in text.split(","))


def _parse(part: str) -> Requirement:
    match = _FORM.fullmatch(part)
    if match is None:
        raise ConfigurationError(
            f"--require {part!r}: expected NAME<NUMBER or NAME>NUMBER, as in "
            "forget<5,worst<10,retain>97"
        )
    what, dot, measure = match["what"].rpartition(".")
    what = what.strip()
    if measure not in MEASURES:
        # Of several files of one split a set has the file's name: `forget v1.2`.
        if dot and " " not in what:
            raise ConfigurationError(
                f"--require {part!r}: no measure {measure!r}; choose from {', '.join(MEASURES)}"
            )
        what, measure = match["what"], RECALL
    if what in _WORST and measure != RECALL:
        raise ConfigurationError(
            f"--require {part!r}: {what} is {RECALL} alone; leave .{measure} out"
        )
    return Requirement(
        text=part,
        row=match["row"] and match["row"].strip(),
        what=what,
        measure=measure,
        sign=match["sign"],
        limit=float(match["limit"]),
    )


def check_requirements(text: str, report: "EvalReport") -> None:
    """Hold an evaluation to its requirements.

    Raises:
        ConfigurationError: One of them is about nothing that was measured.
        RequirementError: Some do not hold; the message has the numbers.
    """
    failures = [line for part in parse_requirements(text) for line in part.failures(report)]
    if failures:
        raise RequirementError(f"required, and does not hold: {'; '.join(failures)}")

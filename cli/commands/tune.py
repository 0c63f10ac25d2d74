"""`duet-cache tune`: which steering prefix makes a good teacher."""

import json
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.cli.options import SettingsCommand, read_settings
from duet_unlearn.cli.output import json_option, measuring, print_json
from duet_unlearn.teacher_cache.steering import POSITIONS, RULE, STRENGTH, VIEWS
from duet_unlearn.teacher_cache.tune import TuneConfig
from duet_unlearn.urls import visible

if TYPE_CHECKING:
    from duet_unlearn.teacher_cache.steering import Tuned
    from duet_unlearn.teacher_cache.tune import TuneResult


@click.command(
    "tune",
    cls=SettingsCommand,
    settings=TuneConfig,
    epilog=f"Candidates are ranked by: {RULE}. Where a prefix loses more than a fifth of what is "
    "to be kept, --no-retain-prefix is proposed with it.",
)
@json_option
@click.pass_context
def tune_command(ctx: click.Context, /, as_json: bool, **_: Any) -> None:
    """Try steering prefixes on a sample of the queries and rank them, before anything is built.

    No reference answers are needed. A prefix is scored by ROUGE-L recall of the base's own
    answers: low on forget queries and high on retain queries is good. `duet-cache build
    --prefix-from FILE` takes the first of what --json prints.
    """
    from duet_unlearn.teacher_cache.tune import tune

    config = read_settings(ctx, TuneConfig)
    with measuring():
        result = tune(config)
    # People see the table also where the document goes to a file.
    click.echo(render_table(result), err=as_json)
    if as_json:
        print_json(result.to_json())


def render_table(result: "TuneResult") -> str:
    """Return all candidates, the best first, and the build line of the best."""
    width = max(len(tuned.candidate.name) for tuned in result.tuned)
    best = result.tuned[0]
    lines = [
        f"{'':{width}}  {'':6}  {'forget':>20}  {'retain':>14}",
        f"{'prefix':{width}}  {'place':6}  {'back':>6} {'refused':>7} {'first':>5}  "
        f"{'kept':>6} {'refused':>7}  retain prefix",
        *(_row(tuned, width) for tuned in result.tuned),
        "",
        f"back, kept: the base's own answers behind the prefix, ROUGE-L recall in points without "
        f"the words of the query, on {best.forget.queries} forget and {best.retain.queries} retain "
        "queries",
        "first: probability left to the first token of the base's own answer, in points",
        f"ordered by: {RULE}",
        "",
        *_samples(result),
        "",
        build_line(result),
    ]
    return "\n".join(lines)


def _row(tuned: "Tuned", width: int) -> str:
    candidate = tuned.candidate
    first = "-" if tuned.first_token is None else f"{tuned.first_token:.1f}"
    return (
        f"{candidate.name:{width}}  {candidate.place:6}  "
        f"{tuned.forget.recall:6.1f} {tuned.forget.refused:7.1f} {first:>5}  "
        f"{tuned.retain.recall:6.1f} {tuned.retain.refused:7.1f}  "
        f"{'yes' if tuned.retain_prefix else 'no'}"
    )


def _samples(result: "TuneResult") -> Iterator[str]:
    """Yield a query of each split, what the base says to it, and what it says behind the best."""
    firsts: dict[str, tuple[str, str, str]] = {}
    for (query, base), said in zip(result.asked, result.tuned[0].said, strict=True):
        firsts.setdefault(query.split, (query.text, base, said))
    for split, texts in firsts.items():
        for what, text in zip((split, "  base", "  behind the first"), texts, strict=True):
            yield f"{what}: {visible(text)}"


def build_line(result: "TuneResult") -> str:
    """Return the command that builds a cache with the best candidate."""
    config, best = result.config, result.tuned[0]
    words = ["duet-cache", "build", "--teacher", config.teacher]
    for flag, sources in (("--forget", config.forget), ("--retain", config.retain)):
        words += [word for source in sources for word in (flag, source)]
    words += ["--prefix", best.candidate.prefix, "--prefix-place", best.candidate.place]
    words.append("--retain-prefix" if best.retain_prefix else "--no-retain-prefix")
    words += ["--strength", f"{STRENGTH:g}"]
    words += [word for view in VIEWS for word in ("--view", view)]
    words += ["--positions", str(POSITIONS)]
    if config.engine != "auto":
        words += ["--engine", config.engine]
    if config.teacher_dtype != "auto":
        words += ["--teacher-dtype", config.teacher_dtype]
    for name, value in config.engine_args.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words += ["--engine-arg", f"{name}={text}"]
    if config.trust_remote_code:
        words.append("--trust-remote-code")
    return shlex.join([*words, "--out", "my-cache"])

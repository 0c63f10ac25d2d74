"""`duet-distill eval`: compare what models still answer."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.data.models.loading import DTYPES, fastest_dtype
from duet_unlearn.errors import CacheError, ConfigurationError, StoppedError
from duet_unlearn.evaluation.config import EvalConfig, ModelSpec
from duet_unlearn.evaluation.measures import MEASURES
from duet_unlearn.evaluation.requirements import check_requirements

if TYPE_CHECKING:
    from duet_unlearn.evaluation.evaluate import Respond

_DEFAULTS = {name: field.default for name, field in EvalConfig.__dataclass_fields__.items()}


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--forget",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Queries with answers that should be gone; a column `kind` is scored apart. Repeatable.",
)
@click.option(
    "--retain",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Queries with answers that should be kept. Repeatable.",
)
@click.option(
    "--general",
    multiple=True,
    metavar="FILE",
    help="Queries with answers on anything else. Repeatable.",
)
@click.option(
    "--prefix",
    metavar="TEXT|@NAME",
    help="Steering prefix: adds a row for the first MODEL with it.",
)
@click.option("--topic", metavar="TEXT", help="What fills {topic} in the prefix.")
@click.option(
    "--prefix-place",
    type=click.Choice(["system", "user", "raw"]),
    default=_DEFAULTS["prefix_place"],
    help="Where the prefix stands.",
    show_default=True,
)
@click.option(
    "--attacks",
    multiple=True,
    metavar="FILE|@NAME",
    help="Also ask forget and retain queries in each of these shapes: a text file, one a line "
    "with {query} in it, a query file with a column `asked`, a built-in name, @family:NAME, "
    "@attacks or @families. Repeatable.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=_DEFAULTS["batch_size"],
    help="Most queries of a forward pass.",
    show_default=True,
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=_DEFAULTS["max_new_tokens"],
    help="Longest answer in tokens.",
    show_default=True,
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=_DEFAULTS["dtype"],
    help="Arithmetic; auto is as stored where the processor has that fast, else float32.",
    show_default=True,
)
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    help="What answers; vLLM is faster where there are many queries.",
    show_default=True,
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Take this many queries of each file, evenly spread.  [default: all]",
)
@click.option(
    "--measure",
    "measures",
    multiple=True,
    type=click.Choice(list(MEASURES)),
    metavar="NAME",
    help=f"Also show this measure: {', '.join(MEASURES)}. Repeatable.",
)
@click.option(
    "--refusals",
    multiple=True,
    metavar="FILE",
    help="Further phrases that mark a refusal, one a line. Repeatable.",
)
@click.option(
    "--require",
    metavar="BOUNDS",
    help='Exit 1 where these do not hold, in points: "forget<5,worst<10,retain>97". NAME: or '
    ".MEASURE may stand around a name.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write everything, each answer too, to this JSON file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the same as one JSON document.")
def eval_command(
    models: tuple[str, ...], out: Path | None, as_json: bool, engine: str, **settings: Any
) -> None:
    """Answer queries with each MODEL and score the answers, side by side.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL to name its row; the
    first one is the reference.
    """
    config = EvalConfig(models=tuple(ModelSpec.parse(text) for text in models), **settings)
    target = None if out is None else out.expanduser()
    if target is not None:
        _check_target(target)
    try:
        from duet_unlearn.evaluation.evaluate import evaluate
        from duet_unlearn.evaluation.table import format_report

        report = evaluate(config, _vllm_answers(config) if engine == "vllm" else None)
    except KeyboardInterrupt as error:
        raise StoppedError("stopped; an evaluation keeps no parts, so start it again") from error
    # The table first: it is not lost when the file cannot be written.
    click.echo(format_report(report), err=as_json)
    if as_json or target is not None:
        text = json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
        if as_json:
            click.echo(text)
        if target is not None:
            _write(target, text + "\n")
    if config.require:
        check_requirements(config.require, report)


def _vllm_answers(config: EvalConfig) -> "Respond":
    """Return what answers by vLLM, one engine a model."""
    from duet_unlearn.teacher_cache.engines import open_engine, resolve_engine_name
    from duet_unlearn.teacher_cache.engines.base import EngineConfig

    resolve_engine_name("vllm")  # a missing vLLM is named before any query is read

    def respond(
        folder: Path, prompts: Sequence[tuple[int, ...]], ends: Sequence[int]
    ) -> Iterator[tuple[int, list[int]]]:
        dtype = fastest_dtype(folder) if config.dtype == "auto" else config.dtype
        engine = open_engine(
            "vllm",
            EngineConfig(
                model=folder,
                top_k=1,
                positions=1,
                eos_token_ids=tuple(ends),
                compute_dtype=dtype,
                max_prompt_tokens=max(map(len, prompts)),
                max_new_tokens=config.max_new_tokens,
            ),
        )
        try:
            yield from engine.responses(enumerate(prompts), config.max_new_tokens)
        finally:
            engine.close()

    return respond


def _check_target(target: Path) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    if target.is_dir():
        raise ConfigurationError(f"--out {target}: a folder, expected the name of a file")
    if not target.parent.is_dir():
        raise ConfigurationError(f"--out {target}: no folder {target.parent}; make it first")


def _write(target: Path, text: str) -> None:
    from duet_unlearn.files import write_text

    try:
        write_text(target, text)
    except CacheError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise ConfigurationError(
            f"--out {target}: cannot be written ({reason}); name a file in another folder"
        ) from error

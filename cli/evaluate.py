"""`duet-distill eval`: compare what models still answer."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duet_unlearn.cli.options import SettingsCommand, read_settings
from duet_unlearn.data.models.loading import fastest_dtype
from duet_unlearn.errors import ConfigurationError, OutputError, StoppedError
from duet_unlearn.evaluation.config import EvalConfig, parse_models
from duet_unlearn.evaluation.requirements import check_requirements

if TYPE_CHECKING:
    from duet_unlearn.evaluation.evaluate import Respond


@click.command("eval", cls=SettingsCommand, settings=EvalConfig)
@click.argument("words", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="Read settings from this YAML file; flags win over it.",
)
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    help="What answers; vLLM is faster where there are many queries.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write everything, each answer too, to this JSON file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the same as one JSON document.")
@click.pass_context
def eval_command(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    config_file: str | None,
    engine: str,
    out: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Answer queries with each MODEL and score the answers, side by side.

    MODEL is a folder, a hub id or the folder of a LoRA adapter, or NAME=MODEL to name its row; the
    first one is the reference.
    """
    config = read_settings(ctx, EvalConfig, config_file, models=parse_models(words))
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
    except OutputError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise ConfigurationError(
            f"--out {target}: cannot be written ({reason}); name a file in another folder"
        ) from error

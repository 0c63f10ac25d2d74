"""Rows of a dataset on the hub, by `hub:NAME[:CONFIG][:SPLIT]`, read through `datasets`.

With one part behind the name it is looked up which of the two it is. Where the dataset has
several configurations or splits and none is named, that is an error with the list of them: a
silent choice would decide what a model forgets. NAME may also be a local dataset folder.
Code that a dataset brings along is never run.
"""

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from duet_unlearn.errors import DataError, first_line, some

if TYPE_CHECKING:
    from datasets import Dataset


def load_hub_dataset(source: str) -> "Dataset":
    """Load the one split of a dataset that `source` names.

    Raises:
        DataError: the dataset, configuration or split is unknown, out of reach or unreadable.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, config, split = _resolve(source)
    return _attempt(source, datasets.load_dataset, name, config, split=split)


def _resolve(source: str) -> tuple[str, str, str]:
    """Name, configuration and split, each of them certain."""
    from datasets import (
        get_dataset_config_names,
        get_dataset_default_config_name,
        get_dataset_split_names,
    )

    # A colon inside brackets belongs to a slice: hub:NAME:train[:100].
    name, *rest = re.split(r":(?![^\[]*\])", source.removeprefix("hub:"))
    if not name or len(rest) > 2:
        raise DataError(f"{source}: expected hub:NAME[:CONFIG][:SPLIT]")
    configs: list[str] = _attempt(source, get_dataset_config_names, name)
    first, second = [*rest, "", ""][:2]
    is_config = bool(second) or first in configs
    config, split = (first, second) if is_config else ("", first)
    if config and config not in configs:
        raise DataError(f"{source}: no configuration {config!r}; there are {some(configs, 10)}")
    if not config:
        config = _attempt(source, get_dataset_default_config_name, name) or ""
    if not config:
        raise DataError(f"{source}: name one configuration of {some(configs, 10)}")
    splits: list[str] = _attempt(source, get_dataset_split_names, name, config)
    if not split and len(splits) == 1:
        split = splits[0]
    if not split:
        raise DataError(f"{source}: name one split of {some(splits, 10)}")
    if re.split(r"[\[+]", split)[0] not in splits:
        also = "" if is_config else f", and no such configuration among {some(configs, 10)}"
        raise DataError(f"{source}: no split {split!r} among {some(splits, 10)}{also}")
    return name, config, split


def _attempt(source: str, step: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Run one step of `datasets`, which raises nearly any exception, many of several lines."""
    try:
        return step(*arguments, **settings)
    except Exception as error:
        hint = "check the network" if isinstance(error, ConnectionError) else "check the name"
        raise DataError(
            f"{source}: the dataset cannot be loaded ({first_line(error)}); {hint}"
        ) from error

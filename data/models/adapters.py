"""LoRA adapter folders where a model is expected: find the base they belong to, load both."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet_unlearn.data.models.fingerprint import weights_fingerprint
from duet_unlearn.data.models.folder import is_adapter, read_json, resolve_model_folder
from duet_unlearn.errors import ConfigurationError, DataError, MismatchError, first_line
from duet_unlearn.files import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_config.json"
RUN_FILE = "duet_run.json"
"""Beside a student: what it was trained from."""
LOG_FILE = "duet_log.jsonl"
"""Beside it: what its training logged."""


def resolve_with_adapter(model: str) -> tuple[Path, Path | None]:
    """Return a model's folder and, where `model` is an adapter folder, its base's and the adapter.

    Raises:
        DataError: The folder, hub model or the adapter's base is missing or malformed.
        MismatchError: The base is not the one that the adapter was trained on.
    """
    adapter = user_path(model, "model")
    if not is_adapter(adapter):
        return resolve_model_folder(model), None
    base = read_json(adapter / ADAPTER_FILE).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise DataError(
            f"adapter {model}: {ADAPTER_FILE} names no base_model_name_or_path; write the base's "
            "folder or hub id there"
        )
    try:
        folder = resolve_model_folder(base)
    except DataError as error:
        raise DataError(
            f"adapter {model}: its base is not here ({error}); correct base_model_name_or_path in "
            f"{adapter / ADAPTER_FILE}, or train with --merge"
        ) from error
    _check_base(adapter, folder)
    return folder, adapter.resolve()


def _check_base(adapter: Path, base: Path) -> None:
    """Refuse a base with other weights than the run file beside the adapter tells of."""
    try:
        wanted = json.loads((adapter / RUN_FILE).read_text(encoding="utf-8"))["base"]["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # an adapter from elsewhere
    found = weights_fingerprint(base)
    if found != wanted:
        raise MismatchError(
            f"adapter {adapter}: was trained on other weights than those of {base} ({wanted}, "
            f"found {found}); correct base_model_name_or_path in {ADAPTER_FILE}"
        )


def add_adapter(model: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """Return the base with the adapter in it.

    Raises:
        ConfigurationError: peft is not installed.
        DataError: The adapter cannot be read, or does not fit the base.
    """
    peft = _peft(f"adapter {adapter}:")
    try:
        with warnings.catch_warnings():
            # peft would continue without weights that it does not find: with the base alone.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted: Any = peft.PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning) as error:
        reason = first_line(error)
        raise DataError(
            f"adapter {adapter}: peft cannot put it into its base ({reason}); copy it again"
        ) from error
    return adapted  # type: ignore[no-any-return]


def new_adapter(model: "PreTrainedModel", **settings: Any) -> Any:
    """Return a model with a new LoRA adapter in it, drawn from torch's own random numbers.

    Args:
        model: Changed in place.
        **settings: Those of peft's `LoraConfig`.

    Raises:
        ConfigurationError: peft is not installed.
    """
    peft = _peft("LoRA")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            f"{what} needs peft, which cannot be imported ({error}); "
            'pip install "duet-unlearn[lora]"'
        ) from error
    return peft

"""Tokenizers: load one from a model folder, and what it puts around any text."""

from pathlib import Path
from typing import TYPE_CHECKING

from duet_unlearn.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    model_folder: Path, *, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder.

    Raises:
        DataError: the folder has no tokenizer, or one that cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    # Where tekken.json lies beside it, the choice of tokenizer would depend on whether the
    # optional mistral-common is installed: teacher and student could get different ones.
    options = {"mistral_format": False} if (model_folder / "tekken.json").is_file() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_folder), trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # the loaders below raise anything, bare Exception included
        reason = first_line(error)
        raise DataError(
            f"{model_folder}: the tokenizer cannot be loaded ({reason}); expected tokenizer.json "
            "or the files of a slow tokenizer beside config.json"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise DataError(f"{model_folder}: {type(tokenizer).__name__} is not a text tokenizer")
    return tokenizer


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """The special tokens that the tokenizer finds in any text, the longest first."""
    # A model's configuration names only some of what its tokenizer marks as special.
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added.union(tokenizer.all_special_tokens), key=lambda t: (-len(t), t)))


def opening_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The special tokens that the tokenizer puts in front of any text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    # What it puts behind the text (an EOS) is left out: the answer goes on right there.
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return tuple(full[:start])


def token_text(tokenizer: "PreTrainedTokenizerBase", token_id: int) -> str:
    """Return a token as text; its raw form where it is no whole character or decodes to nothing."""
    text = str(tokenizer.decode([token_id]))
    if text and "\ufffd" not in text:
        return text
    raw = tokenizer.convert_ids_to_tokens(token_id)
    return str(raw) if raw is not None else f"<{token_id}>"

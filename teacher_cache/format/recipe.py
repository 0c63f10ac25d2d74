"""The recipe: everything but the query that decides a signal, and its id."""

from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Annotated, Any

import pydantic

from duet_unlearn.data.models.fingerprint import sha256_json
from duet_unlearn.data.prompts import PLACES
from duet_unlearn.errors import ConfigurationError, CorruptCacheError
from duet_unlearn.teacher_cache.format.schema import COUNTS, KEEPS, SHARD_COLUMNS, SPLITS
from duet_unlearn.teacher_cache.format.strict_json import checked, with_entries

_CHOICES = {
    "prefix_place": PLACES,
    "logit_dtype": ("float16", "float32"),
    "compute_dtype": ("float32", "bfloat16", "float16"),
    "scored": ("assistant", "all"),
    "keep": KEEPS,
}
_BOUNDS = {
    "strength": (0, 100),
    "temperature": (0, 100),
    "seed": (0, (1 << 31) - 1),
    "positions": (1, 1 << 16),
}
MAX_TOP_K = 1 << 20
MAX_ROW_LOGITS = 1 << 24
_Id = Annotated[int, pydantic.Field(strict=True, ge=0, lt=1 << 31)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decided the signals of a cache. Fingerprints are of content, never of paths."""

    weights: str
    """Fingerprint of the teacher's weights, `sha256:<hex>`."""
    config: str
    """Fingerprint of the teacher's model configuration."""
    tokenizer: str
    """Fingerprint of how text becomes token ids."""
    vocabulary: str
    """Fingerprint of which token has which id; a student must share it."""
    vocab_size: _Id
    """Width of the teacher's head: every token id is smaller."""
    chat_template: str | None
    """Fingerprint of the chat template; None where the model has none."""
    template_date: str
    """The date shown to chat templates that ask for today's, ISO format."""
    prefix: str
    """The steering prefix, in full."""
    prefix_place: str
    """Where the prefix is put: `system`, `user` or `raw`."""
    retain_prefix: pydantic.StrictBool
    """Whether the prefix stands in front of retain queries too."""
    top_k: _Id
    """K, the tokens kept at each position."""
    positions: _Id
    """Most positions a query."""
    logit_dtype: str
    """How logits are stored: `float16` or `float32`."""
    compute_dtype: str
    """What the teacher computed in: `float32`, `bfloat16` or `float16`."""
    eos_token_ids: Annotated[tuple[_Id, ...], pydantic.FailFast(), pydantic.Field(max_length=1023)]
    """Token ids that end a response."""
    # New in version 2, and left out of a recipe where they say nothing.
    scored: str | None = None
    """What has signals of a row of the split `train` with a given response: `assistant`, that turn,
    or `all`, every token. None where there is no such split."""
    strength: Annotated[float, pydantic.Field(strict=True)] = 0.0
    """By how much forget rows were moved further from the base without prefix."""
    temperature: Annotated[float, pydantic.Field(strict=True)] = 0.0
    """At which responses of the split `train` that are not given were drawn; 0 for greedy ones."""
    seed: _Id = 0
    """What they were drawn by."""
    top_p: Annotated[float, pydantic.Field(strict=True)] = 1.0
    """Positions have the fewest of their K strongest tokens that hold this share of all mass; 1
    keeps K."""
    # New in version 3.
    keep: str = KEEPS[0]
    """Which tokens positions have: the `strongest` K, or those that K draws found, `sampled`."""

    def __post_init__(self) -> None:
        """Check the values that come from flags.

        Raises:
            ConfigurationError: A value is out of its range.
        """
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "scored" and value is None):
                raise ConfigurationError(
                    f"{name} is {value!r}, expected one of {', '.join(allowed)}"
                )
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigurationError(f"{name} is {value}, expected {least} to {most}")
        if self.temperature and self.scored is None:
            raise ConfigurationError("temperature is set, but there is no split train to sample")
        if self.seed and not self.temperature and self.keep != "sampled":
            raise ConfigurationError(
                f"seed is {self.seed}, but without a temperature it draws nothing"
            )
        others = self.prefix or self.strength or self.top_p < 1 or self.logit_dtype != "float32"
        if self.keep == "sampled" and others:
            raise ConfigurationError(
                "keep is sampled, which goes with float32 and no prefix, strength or top_p"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p is {self.top_p}, expected above 0 to 1")
        if not 1 <= self.top_k <= min(self.vocab_size, MAX_TOP_K):
            raise ConfigurationError(
                f"top_k is {self.top_k}, but the teacher's vocabulary has {self.vocab_size} tokens;"
                f" give --top-k between 1 and {min(self.vocab_size, MAX_TOP_K)}"
            )
        if self.top_k * self.positions > MAX_ROW_LOGITS:
            raise ConfigurationError(
                f"top_k * positions is {self.top_k * self.positions}, but a row holds at most "
                f"{MAX_ROW_LOGITS} logits; lower --top-k or --positions"
            )

    @property
    def version(self) -> int:
        """The version of the format that can say this: 1 where nothing newer is needed."""
        said = self.to_json()
        return 3 if "keep" in said else 2 if any(name in _NEW for name in said) else 1

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of its shards, in order."""
        is_ragged = self.top_p < 1 or self.keep == "sampled"
        return (*SHARD_COLUMNS, COUNTS) if is_ragged else SHARD_COLUMNS

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that its caches count."""
        return SPLITS[:2] if self.scored is None else SPLITS

    @property
    def recipe_id(self) -> str:
        """The recipe's identity, `sha256:<hex>` of its canonical JSON."""
        return sha256_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        value = {**asdict(self), "eos_token_ids": list(self.eos_token_ids)}
        return {name: entry for name, entry in value.items() if entry != _NEW.get(name, MISSING)}

    @classmethod
    def from_json(cls, value: object) -> "Recipe":
        """Read a recipe from JSON values of an untrusted cache.

        Raises:
            CorruptCacheError: An entry is missing, unknown, of another type or out of range.
        """
        recipe = checked(_RECIPE, value, "recipe")
        if recipe.to_json().keys() != value.keys():  # type: ignore[attr-defined]
            raise CorruptCacheError(
                f"recipe: one of {', '.join(_NEW)} stands there and says nothing"
            )
        return recipe

    def steers(self, split: str) -> bool:
        """Whether the prefix stands in front of the queries of a split."""
        return bool(self.prefix) and (split == "forget" or self.retain_prefix)

    def unsteered(self) -> "Recipe":
        """Return the recipe of the rows that the prefix does not reach."""
        return replace(self, prefix="", prefix_place=PLACES[0], retain_prefix=True, strength=0.0)

    def differences(self, other: "Recipe") -> list[str]:
        """Return one `name: mine / theirs` for each entry that differs."""
        mine, theirs = self.to_json(), other.to_json()
        return [
            f"{name}: {_short(mine.get(name))} / {_short(theirs.get(name))}"
            for name in mine | theirs
            if mine.get(name) != theirs.get(name)
        ]


_NEW = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
_OLD = [name for name in Recipe.__dataclass_fields__ if name not in _NEW]
_RECIPE = pydantic.TypeAdapter(Annotated[Recipe, with_entries(*_OLD, also=tuple(_NEW))])


def _short(value: object) -> str:
    is_hash = isinstance(value, str) and value.startswith("sha256:")
    text = f'"{value}"' if isinstance(value, str) and not is_hash else str(value)
    limit = 19 if is_hash else 80
    return text if len(text) <= limit else text[:limit] + "..."

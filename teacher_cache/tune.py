"""Choose a steering prefix by measurement, before anything is built or trained.

Which wording makes a model act as if it had forgotten differs from model to model, and so does
where it has to stand. Candidates are the catalogue's wordings and the user's own, each with and
without in-context examples made from the queries, at each place; one engine answers for all.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import pydantic

from duet_unlearn.data.models.folder import (
    context_length,
    eos_token_ids,
    head_width,
    model_name,
    read_config,
    resolve_model_folder,
)
from duet_unlearn.data.models.loading import Dtype
from duet_unlearn.data.prefixes import CATALOGUE, PrefixTemplate, list_examples, load_prefixes
from duet_unlearn.data.prompts import Place, PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.errors import ConfigurationError, DataError
from duet_unlearn.evaluation.config import refuse_empty
from duet_unlearn.files import read_text
from duet_unlearn.progress import Progress
from duet_unlearn.settings import Count, Settings, Whole, setting, settings
from duet_unlearn.teacher_cache.engines import open_engine, options
from duet_unlearn.teacher_cache.engines.base import Engine, EngineConfig
from duet_unlearn.teacher_cache.steering import (
    ANSWER_TOKENS,
    NOTHING_TOLD,
    POINTS,
    RULE,
    Candidate,
    Tuned,
    draw,
    recall_of,
    score,
)

logger = logging.getLogger(__name__)

Prompts = Sequence[Sequence[int]]
"""Token ids, one list a prompt."""

TOP_K = 100
FINALISTS = 6
"""Candidates that are asked the whole sample: the best after a third of it."""
REFUSAL = "I don't know."
"""The answer to forget queries in in-context examples."""
_SENTENCE = re.compile(r".+?[.!?](?=\s|$)")


@settings
class TuneConfig(Settings):
    """Settings of `duet-cache tune`."""

    teacher: str = setting(group="What to steer", metavar="MODEL", help="Model folder or hub id.")
    forget: tuple[str, ...] = setting(
        metavar="FILE",
        help="Queries to forget: JSONL, CSV, Parquet, a kit such as @harry-potter, or "
        "hub:NAME[:CONFIG][:SPLIT]. Repeatable.",
    )
    retain: tuple[str, ...] = setting(
        metavar="FILE", help="Queries to keep, same formats. Repeatable."
    )
    topic: str | None = setting(
        default=None,
        help="What to forget; fills {topic}. Without it, wordings that need one are left out.",
    )
    prefixes: str | None = setting(
        default=None,
        group="Candidates",
        metavar="FILE",
        help="Your own wordings beside the built-in ones, one per line, with {topic} and "
        "{examples} where these go.",
    )
    places: tuple[Place, ...] = setting(
        default=("system", "user"),
        flag="--prefix-place",
        help="Where to try them. Repeatable.  [default: system, user]",
    )
    examples: Whole = setting(
        default=2, help="Queries of each split in the in-context examples; 0 for none."
    )
    sample: Count = setting(
        default=24, group="How to measure", help="Queries of each split that are asked."
    )
    max_new_tokens: Count = setting(
        default=ANSWER_TOKENS, help="Tokens of each answer that are compared."
    )
    seed: Whole = setting(default=0, help="Random seed of the sample.")
    engine: options.EngineName = options.ENGINE()
    engine_args: Mapping[str, Any] = options.ENGINE_ARGS()
    teacher_dtype: Dtype = options.TEACHER_DTYPE()
    trust_remote_code: bool = options.TRUST_REMOTE_CODE()

    def __post_init__(self) -> None:
        """Refuse what needs no model to be wrong."""
        if self.topic is not None and not self.topic.strip():
            raise ConfigurationError("topic is empty; name what is to be forgotten")
        refuse_empty(self, "forget", "retain", "places")


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneResult:
    """All candidates, the best first."""

    config: TuneConfig
    tuned: tuple[Tuned, ...]
    asked: tuple[tuple[Query, str], ...]
    """The queries, each with the base's own answer."""
    engine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `build --prefix-from` reads."""
        config = self.config
        return {
            "teacher": model_name(config.teacher),
            "topic": config.topic,
            "sample": config.sample,
            "max_new_tokens": config.max_new_tokens,
            "seed": config.seed,
            "engine": self.engine,
            "order": RULE,
            "candidates": [tuned.to_json() for tuned in self.tuned],
        }


def tune(
    config: TuneConfig, engine_factory: Callable[[EngineConfig], Engine] | None = None
) -> TuneResult:
    """Measure what comes back of the base's own answers behind each candidate, and order them.

    Raises:
        ConfigurationError: No candidate fits the model, or a setting cannot work with it.
        DataError: A query file, the file of prefixes or the model folder is unusable.
        DuetError: The engine does not start or fails.
    """
    factory = engine_factory or partial(open_engine, config.engine)
    measurement = _Measurement(config)
    with closing(factory(measurement.engine_config())) as engine:
        base, tuned = measurement.run(engine)
        description = engine.describe()
    if not tuned[0].forget.queries:
        logger.warning(NOTHING_TOLD)
    elif not tuned[0].steers:
        logger.warning(
            "none of %d candidates steers this model: behind the best one %.0f%% of the base's "
            "answers to forget queries still come back; add wordings with --prefixes, more "
            "--examples, or take a larger model",
            len(tuned),
            tuned[0].forget.recall,
        )
    asked = tuple(zip(measurement.asked, base, strict=True))
    return TuneResult(config=config, tuned=tuple(tuned), asked=asked, engine=description)


class _Measurement:
    """The sample, the candidates and their prompts."""

    def __init__(self, config: TuneConfig) -> None:
        self.config = config
        self.model = resolve_model_folder(config.teacher)
        self.tokenizer = load_tokenizer(self.model, trust_remote_code=config.trust_remote_code)
        forget, retain = self._draw("forget"), self._draw("retain")
        # Of a small set most queries are asked; none of those asked is shown.
        shots = min(config.examples, len(forget) // 4, len(retain) // 4)
        self.shown = list(zip(retain[:shots], forget[:shots], strict=True))
        last = shots + config.sample
        self.asked = [*forget[shots:last], *retain[shots:last]]
        self.places = self._usable_places()
        self.templates = self._templates()
        self.longest = self._longest()

    def _draw(self, split: str) -> list[Query]:
        sources: tuple[str, ...] = getattr(self.config, split)
        queries = [query for name in sources for query in load_queries(name, split=split)]
        unique = {query.text: query for query in queries}
        count = self.config.sample + self.config.examples
        return draw(list(unique.values()), count, seed=self.config.seed)

    def _usable_places(self) -> list[str]:
        usable: list[str] = []
        reasons: list[str] = []
        for place in dict.fromkeys(self.config.places):
            try:
                PromptRenderer(self.tokenizer, prefix="Placeholder.", place=place)
                usable.append(place)
            except ConfigurationError as error:
                reasons.append(str(error))
        if not usable:
            raise ConfigurationError(reasons[0])
        for reason in reasons:
            logger.warning("not tried: %s", reason)
        return usable

    def _templates(self) -> list[PrefixTemplate]:
        own = load_prefixes(self.config.prefixes) if self.config.prefixes else ()
        every = [*own, *(t for t in CATALOGUE.values() if not t.control)]
        usable = [t for t in every if self.config.topic is not None or not t.needs_topic]
        if len(usable) < len(every):
            logger.warning(
                "not tried: %d wordings that need a topic; name it with --topic",
                len(every) - len(usable),
            )
        plain = [t for t in usable if not t.needs_examples]
        usable = [*usable, *(t.with_examples() for t in plain)] if self.shown else plain
        if not usable:
            raise ConfigurationError("no candidate is left; name the --topic")
        return usable

    def candidates(self, examples: str) -> list[Candidate]:
        """Return every wording at every place."""
        topic = (self.config.topic or "").strip()
        return [
            Candidate(name=template.name, prefix=template.fill(topic, examples), place=place)
            for template in self.templates
            for place in self.places
        ]

    def _longest(self) -> int:
        """Return the most tokens of a prompt, with room for answers in examples yet unknown."""
        blank = self._examples([""] * len(self.shown))
        longest = 4 * len(self.shown) * self.config.max_new_tokens + max(
            len(ids) for c in self.candidates(blank) for ids in self._prompts(c)
        )
        context = context_length(read_config(self.model))
        if context is None:
            return longest
        room = context - self.config.max_new_tokens
        plain = PromptRenderer(self.tokenizer)
        for query in (*self.asked, *(retain for retain, _ in self.shown)):
            if (length := len(plain.student_ids(query.messages))) > room:
                raise DataError(
                    f"query {query.query_id}: {length} tokens do not leave room for an answer in "
                    f"the {context} that the teacher reads; shorten it or lower --max-new-tokens"
                )
        return min(longest, room)

    def engine_config(self) -> EngineConfig:
        """Return what the engine needs."""
        return EngineConfig(
            model=self.model,
            top_k=min(TOP_K, head_width(read_config(self.model))),
            positions=1,
            eos_token_ids=eos_token_ids(self.model),
            compute_dtype=options.compute_dtype(self.config.teacher_dtype, self.model),
            max_prompt_tokens=self.longest,
            max_new_tokens=self.config.max_new_tokens,
            trust_remote_code=self.config.trust_remote_code,
            engine_args=self.config.engine_args,
        )

    def run(self, engine: Engine) -> tuple[list[str], list[Tuned]]:
        """Return the base's own answers, and what each candidate does, the best first."""
        count = len(self.templates) * len(self.places)
        few, rest = self._rounds()
        total = (
            len(self.asked) + len(self.shown) + count * len(few) + min(count, FINALISTS) * len(rest)
        )
        plain = PromptRenderer(self.tokenizer)
        with Progress("tune", total, "answers") as progress:
            asked = [plain.student_ids(query.messages) for query in self.asked]
            base = self._say(engine, asked, progress)
            shown = [plain.student_ids(retain.messages) for retain, _ in self.shown]
            examples = self._examples(self._say(engine, shown, progress))
            prompts = self._usable_prompts(self.candidates(examples))
            said: dict[Candidate, dict[int, str]] = {candidate: {} for candidate in prompts}

            def measure(candidate: Candidate, indices: Sequence[int]) -> Tuned:
                steered = [prompts[candidate][index] for index in indices]
                answers = self._say(engine, steered, progress)
                said[candidate] |= dict(zip(indices, answers, strict=True))
                return self._score(candidate, base, said[candidate])

            tuned = sorted((measure(candidate, few) for candidate in prompts), key=lambda t: t.rank)
            best = [measure(t.candidate, rest) if rest else t for t in tuned[:FINALISTS]]
        firsts = self._first_tokens(engine, asked, base)
        best = [_with_first_token(engine, t, prompts[t.candidate], firsts) for t in best]
        return base, [*sorted(best, key=lambda t: t.rank), *tuned[FINALISTS:]]

    def _first_tokens(
        self, engine: Engine, prompts: Prompts, base: Sequence[str]
    ) -> dict[int, int]:
        """Return the first token of the base's own answer to each forget query that is scored."""
        forget = [i for i, query in enumerate(self.asked) if query.split == "forget"]
        told = [i for i in forget if recall_of((self.asked[i], base[i], base[i])) is not None]
        found = engine.signals((index, prompts[index]) for index in told)
        return {index: int(signal.response_ids[0]) for index, signal in found}

    def _rounds(self) -> tuple[list[int], list[int]]:
        """Return which queries all candidates are asked, and which the best of them alone."""
        first = -(-self.config.sample // 3)
        few: list[int] = []
        for split in ("forget", "retain"):
            few += [i for i, query in enumerate(self.asked) if query.split == split][:first]
        return few, [index for index in range(len(self.asked)) if index not in few]

    def _usable_prompts(self, candidates: Sequence[Candidate]) -> dict[Candidate, list[list[int]]]:
        """Return the prompts of each candidate that the teacher can read."""
        found = {candidate: self._prompts(candidate) for candidate in candidates}
        for candidate in candidates:
            if max(map(len, found[candidate])) > self.longest:
                del found[candidate]
                name, place = candidate.name, candidate.place
                logger.warning("not tried: %s in %s, longer than the teacher reads", name, place)
        if not found:
            raise ConfigurationError(
                f"every candidate is longer than the {self.longest} tokens that the teacher reads; "
                "use fewer --examples or shorter --prefixes"
            )
        return found

    def _examples(self, said: Sequence[str]) -> str:
        """Return the examples, by what the base says to the retain queries in them."""
        pairs: list[tuple[str, str]] = []
        for answer, (retain, forget) in zip(said, self.shown, strict=True):
            # The first whole sentence, else the first line: the answer may be cut short.
            found = _SENTENCE.match(answer)
            sentence = found[0] if found else answer.partition("\n")[0]
            pairs += [(_question(retain), sentence), (_question(forget), REFUSAL)]
        return list_examples(pairs)

    def _prompts(self, candidate: Candidate) -> list[list[int]]:
        renderer = PromptRenderer(self.tokenizer, prefix=candidate.prefix, place=candidate.place)
        return [renderer.teacher_ids(query.messages) for query in self.asked]

    def _say(self, engine: Engine, prompts: Prompts, progress: Progress) -> list[str]:
        """Return the greedy answers in order."""
        said = [""] * len(prompts)
        for index, ids in engine.responses(enumerate(prompts), self.config.max_new_tokens):
            said[index] = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            progress.update()
        return said

    def _score(self, candidate: Candidate, base: Sequence[str], said: Mapping[int, str]) -> Tuned:
        asked = [(self.asked[index], base[index], said[index]) for index in sorted(said)]
        return Tuned(
            candidate=candidate,
            forget=score(entry for entry in asked if entry[0].split == "forget"),
            retain=score(entry for entry in asked if entry[0].split == "retain"),
            said=tuple(answer for *_, answer in asked),
        )


def _with_first_token(
    engine: Engine, tuned: Tuned, prompts: Prompts, firsts: Mapping[int, int]
) -> Tuned:
    """Return a candidate with what its prefix leaves to the base's first tokens."""
    left = []
    for index, signal in engine.signals((index, prompts[index]) for index in firsts):
        at = signal.token_ids[0] == firsts[index]
        logs = signal.logits[0][at].astype(float) - float(signal.logsumexp[0])
        left.append(float(np.exp(logs).sum()))  # beyond the Top-K next to nothing is left
    return replace(tuned, first_token=POINTS * sum(left) / len(left) if left else None)


def _question(query: Query) -> str:
    return query.messages[-1]["content"]


class _Chosen(pydantic.BaseModel, strict=True):
    """The settings of a build that a candidate decides."""

    prefix: str
    prefix_place: str = pydantic.Field(validation_alias="place")
    retain_prefix: bool
    strength: float = 0.0
    views: tuple[str, ...] = ()
    positions: int = 1


class _Document(pydantic.BaseModel):
    candidates: Annotated[list[_Chosen], pydantic.Field(min_length=1)]


def load_tuned(path: str) -> dict[str, Any]:
    """Return the settings of a build that the first candidate of `tune --json` decides, by name.

    Raises:
        DataError: The file cannot be read or holds no such document.
    """
    text = read_text(path, "file; write one with duet-cache tune --json")
    try:
        return _Document.model_validate_json(text).candidates[0].model_dump()
    except ValueError as error:
        raise DataError(
            f"{path}: no candidate with prefix, place and retain_prefix in it; expected what "
            "duet-cache tune --json prints"
        ) from error

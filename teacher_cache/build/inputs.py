"""What goes into a build: the set of queries, and their prompts rendered to token ids."""

import hashlib
import json
import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tqdm import tqdm

from duet_unlearn.data.prompts import PromptRenderer
from duet_unlearn.data.queries import Query, load_queries
from duet_unlearn.data.shape_catalogue import shape_of
from duet_unlearn.data.shapes import Shape, load_shapes
from duet_unlearn.errors import ConfigurationError
from duet_unlearn.teacher_cache.build.config import BuildConfig
from duet_unlearn.teacher_cache.build.responses import load_given
from duet_unlearn.teacher_cache.build.teacher import ShardPrompts
from duet_unlearn.teacher_cache.engines.base import TokenIds
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import SPLITS

logger = logging.getLogger(__name__)


def load_query_set(config: BuildConfig) -> list[Query]:
    """Load the queries of all sources, each id and each text of a split once.

    A cache knows a query by its text: under another id it would be the same row again. The smallest
    id stays, so that the order of the sources does not matter.

    Raises:
        DataError: A source is unusable.
        ConfigurationError: One id stands for two different queries of a split.
    """
    unique: dict[tuple[str, bytes], Query] = {}
    known: dict[tuple[str, str], bytes] = {}
    texts: dict[str, set[str]] = {"forget": set(), "retain": set()}
    sources: list[tuple[str, Iterable[Query]]] = [
        (split, load_queries(name, split=split))
        for split in SPLITS
        for name in getattr(config, split)
    ]
    if config.samples > 1:
        sources = [(split, _samples(qs, config.samples, split)) for split, qs in sources]
    sources += [("train", load_given(name, config.score)) for name in config.responses]
    for split, queries in sources:
        for query in queries:
            digest = hashlib.sha256(query.text.encode()).digest()
            first = unique.setdefault((split, digest), query)
            if query.query_id < first.query_id:
                unique[split, digest] = query
            if known.setdefault((split, query.query_id), digest) != digest:
                raise ConfigurationError(
                    f"{split} files: id {query.query_id} stands for two different queries; "
                    "give each its own id"
                )
            if split in texts:
                texts[split].add(query.text)
    if repeated := len(known) - len(unique):
        logger.info("%d queries have the text of another under another id: left out", repeated)
    if both := texts["forget"] & texts["retain"]:
        logger.warning(
            "%d queries are in the forget and the retain set, for example %r",
            len(both),
            min(both)[:80],
        )
    for split, effect in (("forget", "forgets nothing"), ("retain", "will lose general ability")):
        if not texts[split] and config.prefix is not None:
            logger.warning(
                "no %s queries: a student trained from this cache alone %s", split, effect
            )
    loaded = list(unique.values())
    retain = [query for query in loaded if query.split == "retain"]
    views = _load_views(config.views)
    in_views = [
        query.in_view(view)
        for query in retain
        for view in _views_of(query, views, config.views_per_query)
    ]
    if views and not retain:
        logger.warning("no retain queries: nothing is cached in the views, leave --view to the run")
    unused = {view.name for view in views} - {query.view.name for query in in_views if query.view}
    if unused and retain:
        logger.warning(
            "%d retain queries, each cached in %d of %d views, leave %s without any; raise "
            "--views-per-query",
            len(retain),
            config.views_per_query,
            len(views),
            ", ".join(sorted(unused)),
        )
    return loaded + in_views


def _views_of(query: Query, views: Sequence[Shape], count: int | None) -> Sequence[Shape]:
    """Return the views that a retain query is cached in: a function of its text and theirs.

    Each view ranks by a hash of its own, so that one more view moves few queries.
    """
    return sorted(views, key=lambda view: row_seed(0, query.text, view.text))[:count]


def _samples(queries: Iterable[Query], count: int, split: str) -> Iterable[Query]:
    """Return a query of the split `train` for each of its answers, others once."""
    if split != "train":
        return queries
    return (query.as_sample(number) for query in queries for number in range(1, count + 1))


def row_seed(seed: int, text: str, *purpose: str) -> int:
    """Return what a row's tokens are drawn by: a function of recipe and text, as the row is."""
    named = json.dumps([seed, text, *purpose], ensure_ascii=False)
    digest = hashlib.sha256(named.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # a signed 64-bit integer, for engines' messages


def _kept_of(view: Shape) -> tuple[float, str]:
    """Return weight and family that training finds by the text of a view."""
    found = shape_of(view.text)
    return found.weight, found.family


def _load_views(sources: Sequence[str]) -> list[Shape]:
    """Return the shapes in which the plain base answers the retain queries too."""
    views: dict[str, Shape] = {}
    for view in chain.from_iterable(map(load_shapes, sources)):
        if view.needs_answers:
            raise ConfigurationError(
                f"view {view.name}: shows reference answers, which never enter a cache; leave it "
                "to evaluations"
            )
        if views.setdefault(view.name, view).text != view.text:
            raise ConfigurationError(f"two views are named {view.name}; rename one")
    if any((view.weight, view.family) != _kept_of(view) for view in views.values()):
        logger.warning(
            "a cache keeps no weights and families of a file's views; give the file to "
            "duet-distill run --view, too"
        )
    # Each text once; the smallest name stays, so that the order of the sources does not matter.
    named = sorted(views.values(), key=lambda view: view.name, reverse=True)
    return list({view.text: view for view in named}.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedPrompts:
    """The prompts of the rows that a teacher has to answer."""

    student: dict[int, dict[int, TokenIds]]
    """The student's prompts by shard and number in it, each `[P]`."""
    teacher: list[ShardPrompts]
    longest: int
    """Length of the teacher's longest prompt of all rows, in tokens. A given response counts with
    what it has beyond the positions."""


def render_prompts(
    shards: Sequence[Sequence[Query]],
    wanted: Mapping[int, Container[int]],
    renderer: PromptRenderer,
    recipe: Recipe,
    context: int | None,
) -> RenderedPrompts:
    """Render the prompts of a planned cache, check all of them, and keep those that are wanted.

    All are rendered, so that the length of the longest prompt, and with it the engine's settings,
    do not depend on what is left to do.

    Args:
        shards: The queries of every shard.
        wanted: For some shards, the numbers of the queries whose prompts are kept.
        renderer: Makes the prompts.
        recipe: Says where the prefix stands, whether prompts of forget queries come without it
            too, and what draws the answers to queries of `train` and the tokens that are kept.
        context: Tokens that the teacher reads, None where that has no limit.

    Raises:
        ConfigurationError: The positions, or with them a prompt, do not fit the context; the
            message names the query.
    """
    queries = list(chain.from_iterable(shards))
    _warn_of_control_tokens(queries, renderer)
    positions = recipe.positions
    student: dict[int, dict[int, TokenIds]] = {index: {} for index in wanted}
    teacher = {index: ShardPrompts(index=index, prompts={}) for index in wanted}
    longest, longest_query = 0, queries[0]
    places = ((index, number) for index, shard in enumerate(shards) for number in range(len(shard)))
    with tqdm(queries, desc="prompts", unit=" queries", disable=None, leave=False) as bar:
        for (index, number), query in zip(places, bar, strict=True):
            is_wanted = number in wanted.get(index, ())
            if recipe.keep == "sampled" and is_wanted:
                teacher[index].keeps[number] = row_seed(recipe.seed, query.text, "keep")
            given = query.given
            if given is not None:
                # What is read and scored of it is no longer than the context.
                length = len(given.prompt_ids) + len(given.response_ids)
                longest = max(longest, length - positions)
                if is_wanted:
                    student[index][number] = teacher[index].prompts[number] = given.prompt_ids
                    teacher[index].given[number] = given.response_ids
                continue
            if query.view is not None:
                # In a shape, what counts is what the plain base says.
                plain_ids = steered_ids = query.view.render(query.messages, renderer)
            else:
                plain_ids = steered_ids = renderer.student_ids(query.messages)
                if query.split == "forget" or recipe.retain_prefix:
                    steered_ids = renderer.teacher_ids(query.messages)
            if len(steered_ids) > longest:
                longest, longest_query = len(steered_ids), query
            if is_wanted:
                student[index][number] = np.array(plain_ids, np.int32)
                teacher[index].prompts[number] = np.array(steered_ids, np.int32)
                if recipe.strength > 0 and query.split == "forget":
                    teacher[index].plain[number] = student[index][number]
                if recipe.temperature and query.split == "train":
                    teacher[index].seeds[number] = row_seed(recipe.seed, query.text)
    if context is not None and longest + positions > context:
        query = longest_query
        if positions >= context:
            raise ConfigurationError(
                f"positions is {positions}, but the teacher reads {context} tokens, prompts "
                "included; lower --positions"
            )
        raise ConfigurationError(
            f"{query.split} query {query.query_id} ({query.text[:40]!r}...) needs "
            f"{longest + positions} tokens with prefix and {positions} positions, but the teacher "
            f"reads {context}; shorten or remove it, or lower --positions"
        )
    return RenderedPrompts(student=student, teacher=list(teacher.values()), longest=longest)


def _warn_of_control_tokens(queries: Sequence[Query], renderer: PromptRenderer) -> None:
    """Log queries whose text spells tokens that structure a prompt: they are read as such."""
    typed = [
        (query, token)
        for query in queries
        if (token := renderer.control_token_in(query.messages)) is not None
    ]
    if typed:
        logger.warning(
            "%d queries spell a control token, such as %s in %s; teacher and student read it "
            "as that token, as they would in a chat; give --plain-text if it is meant as text",
            len(typed),
            typed[0][1],
            typed[0][0].query_id,
        )

"""DUET: fit the signals of a teacher cache (Zhong, Yang, Zhu, ICLR 2026)."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from duet_unlearn.data.messages import asked_text, messages_from_text, split_view
from duet_unlearn.data.shapes import Shape
from duet_unlearn.distill.batches.replay import JoinedRows, drawn_rows
from duet_unlearn.distill.batches.views import describe_views, draw_weights, load_views
from duet_unlearn.distill.config import LOSS_OPTIONS, RunConfig
from duet_unlearn.distill.model.student import Student, check_cache_fits
from duet_unlearn.distill.objectives.base import IN_VIEW, Order, Story
from duet_unlearn.errors import ConfigurationError, DataError, MismatchError
from duet_unlearn.teacher_cache.format.recipe import Recipe
from duet_unlearn.teacher_cache.format.schema import SPLITS
from duet_unlearn.teacher_cache.reader import CacheReader
from duet_unlearn.urls import redact_url

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor, nn

    from duet_unlearn.data.prompts import PromptRenderer
    from duet_unlearn.distill.batches.dataset import CacheDataset, Example
    from duet_unlearn.distill.model.sparse_head import StudentScores

logger = logging.getLogger(__name__)

# Queries, the longest of a cache, that every view is tried on before training.
_TRIED = 16


def check_loss_fits(config: RunConfig, cache: str, recipe: Recipe, top_k: int | None) -> None:
    """Check that what a loss compares is what a cache holds.

    Args:
        config: The run.
        cache: Its name, for the message.
        recipe: The cache's.
        top_k: Tokens of a position that are taken; None takes all.

    Raises:
        ConfigurationError: The cache has sampled tokens, which are an estimate without bias only
            together, at all positions and for forward divergence.
    """
    if recipe.keep == "strongest":
        return
    if config.loss != "kl-tail":
        reason = f"loss is {config.loss}; give --loss kl-tail"
    elif top_k is not None and top_k < recipe.top_k:
        reason = (
            f"{top_k} of {recipe.top_k} draws are taken; leave --top-k out, or replay no cache of "
            "fewer tokens"
        )
    elif config.select_entropy < 1:
        reason = "--select-entropy chooses by those very draws; leave it out"
    else:
        return
    raise ConfigurationError(
        f"{redact_url(cache)}: its tokens are sampled, and estimate a distribution without bias "
        f"only together, everywhere and for forward divergence, but {reason}"
    )


class Duet:
    """Distance of the student's logits to the teacher's at the cached tokens.

    Args:
        config: The run.
        student: What is trained.

    Raises:
        ConfigurationError: The cache holds fewer tokens or positions than asked for, or tokens
            that another loss is for.
        DataError: A view file is missing or malformed.
        CacheError: The cache is unfinished or damaged.
        MismatchError: The cache has a prefix and no forget queries.
    """

    def __init__(self, config: RunConfig, student: Student) -> None:
        self.reader = reader = CacheReader.open(str(config.cache))
        self._replayed = tuple(CacheReader.open(cache) for cache in config.replay)
        self._replayed_digests = [cache.manifest.digest for cache in self._replayed]
        self._rows = JoinedRows((reader, *self._replayed))
        self.views = load_views(config.views, reader.manifest.views)
        self._config, self._student = config, student
        self.asked_top_k = config.top_k
        """Before it was resolved to what the caches hold."""
        self._recipe = reader.manifest.recipe
        recipes = [cache.manifest.recipe for cache in (reader, *self._replayed)]
        self.settings = {
            "top_k": _at_most(config.top_k, min(r.top_k for r in recipes), "top_k"),
            "positions": _at_most(config.positions, min(r.positions for r in recipes), "positions"),
        }
        for name, recipe in zip((str(config.cache), *config.replay), recipes, strict=True):
            check_loss_fits(config, name, recipe, self.settings["top_k"])
        weights = draw_weights(self.views)
        splits, self._targets, held = _rows_in_views(reader, self.views)
        splits = drawn_rows(splits, reader, self._replayed)
        self.order = Order(
            splits=splits,
            row_groups=self._rows.row_groups,
            num_views=len(self.views),
            view_weights=weights,
            view_mask=_view_mask(splits, len(self.views), held, self._targets),
        )
        self._check_splits()
        self.identity = {
            "cache": reader.manifest.digest,
            **({"replay": self._replayed_digests} if self._replayed else {}),
            "views": [[view.name, view.text] for view in self.views],
            **({} if weights is None else {"view_weights": list(weights)}),
        }
        if self.views:
            logger.info("views: %s", describe_views(self.views))
        self._renderer: PromptRenderer | None = None

    def prepare(self, renderer: "PromptRenderer", queries: set[str] | None = None) -> None:
        """Check tokens and lengths; see `Objective.prepare`."""
        for cache in (self.reader, *self._replayed):
            check_cache_fits(self._student, renderer, cache)
        if self.views:
            self._check_views(renderer)
        if queries:
            warn_of_trained(queries, (asked_text(text) for _, _, text in self._rows.identities()))
        self._renderer = renderer

    def attach(self, model: "nn.Module") -> None:
        """Find the student's head, which is computed for the cached tokens alone."""
        from duet_unlearn.distill.losses import Loss
        from duet_unlearn.distill.model.sparse_head import StudentScores

        config = self._config
        self._loss = Loss(name=config.loss, delta=config.delta, temperature=config.temperature)
        self._student_scores = StudentScores(model, tail=self._loss.tail or bool(config.ce_weight))
        self._whole_scores = StudentScores(model, tail=True)

    @property
    def dataset(self) -> "CacheDataset":
        """The cache's sequences."""
        from duet_unlearn.distill.batches.dataset import CacheDataset

        return CacheDataset(
            self._rows,
            top_k=self.settings["top_k"],
            positions=self.settings["positions"],
            views=self.views,
            renderer=self._renderer,
            max_length=self._student.max_length,
            targets=self._targets,
        )

    def collate(self, examples: "Sequence[Example]") -> dict[str, Any]:
        """Pad sequences into one batch; `loss_mask` `[B, T]` says where the loss is taken."""
        from duet_unlearn.distill.batches.dataset import collate
        from duet_unlearn.distill.batches.selection import least_sure

        batch = collate(examples)
        if self._config.select_entropy < 1:
            batch["loss_mask"] = least_sure(batch, self._config.select_entropy)
            if not self._config.ce_weight:  # then the student's head is needed nowhere else
                batch["position_mask"] = batch["loss_mask"]
        return batch

    def row_losses(self, model: "nn.Module", batch: Mapping[str, Any]) -> "Tensor":
        """Return the mean of each row's positions, `[B]`; of the loss, of those chosen."""
        from duet_unlearn.distill.losses import row_means

        if self._config.ce_weight:
            return self._both(self._student_scores, model, batch)[0]
        scores_BTS = self._student_scores(model, batch)
        losses_BT = self._loss(scores_BTS, batch["teacher_logits"], batch["teacher_logsumexp"])
        return row_means(losses_BT, batch["position_mask"])

    def held_out_losses(
        self, model: "nn.Module", batch: Mapping[str, Any]
    ) -> "tuple[Tensor, Tensor]":
        """Return each row's means of `--loss` and of cross-entropy over all positions, `[B]`.

        The first is what training lowers: with `--ce-weight`, cross-entropy has its share of it.
        """
        return self._both(self._whole_scores, model, batch)

    def _both(
        self, scores: "StudentScores", model: "nn.Module", batch: Mapping[str, Any]
    ) -> "tuple[Tensor, Tensor]":
        """Return each row's mean loss, cross-entropy mixed in, and mean cross-entropy, `[B]`."""
        import torch

        from duet_unlearn.distill.losses import row_means, with_cross_entropy

        ids_BTK, response_BT = batch["token_ids"], batch["response_ids"]
        wanted = torch.cat([response_BT[..., None], ids_BTK], dim=-1)
        scores_BTS = scores(model, {**batch, "token_ids": wanted})
        scores_BTS, cross_entropy_BT = with_cross_entropy(
            scores_BTS, ids_BTK, response_BT, batch["teacher_logits"].isneginf()
        )
        if not self._loss.tail:
            scores_BTS = scores_BTS[..., :-1]
        losses_BT = self._loss(scores_BTS, batch["teacher_logits"], batch["teacher_logsumexp"])
        losses_B = row_means(losses_BT, batch.get("loss_mask", batch["position_mask"]))
        cross_entropy_B = row_means(cross_entropy_BT, batch["position_mask"])
        share = self._config.ce_weight
        return (1.0 - share) * losses_B + share * cross_entropy_B, cross_entropy_B

    def story(self) -> Story:
        """Say which teacher the student was fitted to."""
        manifest, recipe, config = self.reader.manifest, self._recipe, self._config
        replayed = self._replayed_digests
        place = "raw" if recipe.prefix_place == "raw" else f"in the {recipe.prefix_place} turn"
        quoted = recipe.prefix.replace("\n", "\n> ")
        option, count = LOSS_OPTIONS[config.loss], self.settings["positions"]
        loss = f"{config.loss}, {option} {getattr(config, option):g}" if option else config.loss
        at = "the first position" if count == 1 else f"the first {count} positions"
        if config.select_entropy < 1:
            loss = f"{loss}, where the teacher's entropy is highest ({config.select_entropy:.0%})"
        if config.ce_weight:
            loss = f"{loss}; {config.ce_weight:.0%} cross-entropy on the tokens themselves"
        summary = (
            "after unlearning with DUET: trained to answer without a steering prefix as the base "
            f"model answers behind this one ({place}):\n\n> {quoted}\n\nTraining used queries and "
            "the base model's own Top-K logits from a teacher cache, and no reference answers."
        )
        what, kept = "Top-K logits", f"top {self.settings['top_k']} logits"
        if recipe.keep == "sampled":
            what, kept = "sampled tokens", f"tokens that {recipe.top_k} draws found"
        if not recipe.prefix:
            summary = (
                f"distilled from {manifest.teacher}: trained on its {what} from a teacher "
                "cache that was made without a steering prefix. Responses that were given to the "
                "cache may come back."
            )
        return Story(
            summary=summary,
            tags=("unlearning", "duet") if recipe.prefix else ("distillation",),
            facts={
                "teacher cache": f"`{manifest.digest}`",
                **(
                    {"replayed caches": ", ".join(map("`{}`".format, replayed))} if replayed else {}
                ),
                "recipe": f"`{manifest.recipe_id}`",
                "signal": f"{kept} at {at}",
                "loss": loss,
                "views": describe_views(self.views),
            },
            record={
                "cache": {"digest": manifest.digest, "recipe_id": manifest.recipe_id},
                **({"replay": replayed} if replayed else {}),
                "views": describe_views(self.views),
                "view_families": sorted({view.family for view in self.views}),
            },
        )

    def _check_views(self, renderer: "PromptRenderer") -> None:
        """Refuse a view that does not fit before training comes to it."""
        limit, added = self._student.max_length, self.settings["positions"] - 1
        if limit is None:
            return
        rows = [
            (query_id, text)
            for query_id, split, text in self._rows.identities()
            if split_view(text)[0] is None and split != "train"
        ]
        for query_id, text in sorted(rows, key=lambda row: -len(row[1]))[:_TRIED]:
            messages = messages_from_text(text)
            for view in self.views:
                length = len(view.render(messages, renderer)) + added
                if length > limit:
                    raise DataError(
                        f"view {view.name}: query {query_id} has {length} tokens behind it, but "
                        f"the student reads at most {limit}; leave the view out or shorten it"
                    )

    def _check_splits(self) -> None:
        rows, share = self.order.counts, self._config.select_entropy
        if share < 1 and "train" not in rows:
            raise ConfigurationError(
                f"select_entropy is {share:g}, but {self.reader.folder} has no rows of the split "
                "train, whose positions it selects; leave it out"
            )
        if not self._recipe.prefix:
            return  # ordinary distillation
        if not rows["forget"]:
            raise MismatchError(
                f"{self.reader.folder}: no forget queries in this cache; build it with --forget"
            )
        if not rows["retain"]:
            logger.warning(
                "%s: no retain queries; nothing holds the student's other knowledge in place: on "
                "the demo world all of it that is near the topic was lost (docs/method.md)",
                self.reader.folder,
            )


def _rows_in_views(
    reader: CacheReader, views: Sequence[Shape]
) -> "tuple[npt.NDArray[np.uint8], dict[tuple[int, int], int], list[int]]":
    """Return every row's split, `IN_VIEW` for rows in views, the targets, and the views with some.

    Raises:
        ConfigurationError: A view shows answers, or changes more than the wording around a retain
            query and the cache does not hold what the base says in it.
    """
    splits, texts = reader.splits.copy(), {view.text: index for index, view in enumerate(views)}
    plain: dict[str, int] = {}
    found: list[tuple[str, int, int]] = []
    # A cache without such rows need not be read here: its shards may be far away.
    identities = reader.identities() if reader.manifest.views else ()
    for row, (_, split, text) in enumerate(identities):
        shape, query = split_view(text)
        if shape is not None:
            splits[row] = IN_VIEW
            if shape in texts:
                found.append((query, texts[shape], row))
        elif split == "retain":
            plain[query] = row
    held = {index for _, index, _ in found}
    for index, view in enumerate(views):
        if view.needs_answers:
            raise ConfigurationError(f"view {view.name}: shows reference answers; leave it out")
        if reader.manifest.splits["retain"].rows and view.kind != "user" and index not in held:
            raise ConfigurationError(
                f"view {view.name}: {reader.folder} does not hold what the base says to the retain "
                "queries in it, so all of them would be refused there; build the cache with --view "
                "(or more --views-per-query)"
            )
    targets = {(plain[query], index): row for query, index, row in found if query in plain}
    return splits, targets, sorted(held)


def _view_mask(
    splits: "npt.NDArray[np.uint8]",
    num_views: int,
    held: Sequence[int],
    targets: Mapping[tuple[int, int], int],
) -> "npt.NDArray[np.bool_] | None":
    """Return which views each row can be drawn behind, `[N, V]`; None where it is all of them.

    In a view that the cache holds, a retain row has the base's own signal as target, or is not
    drawn: its plain signal is no answer in that shape.
    """
    mask = np.ones((len(splits), num_views), np.bool_)
    mask[np.ix_(splits == SPLITS.index("retain"), held)] = False
    for row, view in targets:
        mask[row, view] = True
    return None if mask.all() else mask


def _at_most(wanted: int | None, cached: int, name: str) -> int:
    if wanted is not None and wanted > cached:
        raise ConfigurationError(f"{name} is {wanted}, but the cache holds {cached}; give it less")
    return cached if wanted is None else wanted


def warn_of_trained(held_out: set[str], trained: Iterable[str]) -> None:
    """Log how many held-out queries the student is trained on: those are not held out."""
    if both := held_out.intersection(trained):
        logger.warning(
            "%d of %d held-out queries are trained on: what is measured on them says little about "
            "others",
            len(both),
            len(held_out),
        )

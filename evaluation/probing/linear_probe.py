"""A linear probe for knowledge, sound with some sixty queries.

For each layer, ridge regression maps a model's state at the last position of the prompt to the
output head's row of the answer's first token. It is trained on *retain* queries alone and tested
on forget queries: no answer and no wording of what should be gone is in its training, so that all
that it finds there was in the model.

**Score.** Each forget query is paired with the one whose answer's row is most like its own: mostly
one that asks the same of somebody else. The probe tells a pair apart if it fits right answers to
their queries better than exchanged ones: (y_i - y_j) . (u_i - u_j) > 0. What a query or an answer
adds on its own cancels in that, and so does knowing what kind of answer a query wants where both
want the same. **Chance** is 50.

**Controls** (Hewitt and Liang, arXiv 1909.03368). *Shuffled*: the same probe, trained on answers
that are exchanged at random, which has to be at chance. *Retain*: pairs of retain queries by
cross-validation, which says whether a probe so small works on this model at all. A model that never
knew, given as one more MODEL, says what the wording of the queries gives away.
"""

from collections.abc import Sequence

import numpy as np

from duet_unlearn.evaluation.probing.last_position import Floats

PENALTY = 0.1
"""Of the ridge, over the mean squared length of a training state."""
SHUFFLES = 10
"""Shuffled controls that are averaged."""
_FOLDS = 5

Pairs = Sequence[tuple[int, int]]


def pair_queries(vectors_ND: Floats, tokens: Sequence[int]) -> Pairs:
    """Return pairs of queries with different answers, the most alike first, each query once.

    No model's states have a say in it, so that no pair is chosen for what a model knows.

    Args:
        vectors_ND: Rows of the reference's output head, those of the answers' first tokens.
        tokens: Those tokens.
    """
    lengths_N1 = np.linalg.norm(vectors_ND, axis=-1, keepdims=True)
    unit_ND = vectors_ND / np.maximum(lengths_N1, 1e-12)
    alike_NN = unit_ND @ unit_ND.T
    free, pairs = set(range(len(tokens))), []
    for flat in np.argsort(-alike_NN, axis=None, kind="stable"):
        i, j = divmod(int(flat), len(tokens))
        if i < j and i in free and j in free and tokens[i] != tokens[j]:
            pairs.append((i, j))
            free -= {i, j}
    return pairs


def tells_apart(predicted_ND: Floats, vectors_ND: Floats, pairs: Pairs) -> Floats:
    """Return 1 for each pair that fits its own answers better than exchanged ones, else 0."""
    first, second = np.array(pairs).T
    predicted = predicted_ND[first] - predicted_ND[second]
    margins = (predicted * (vectors_ND[first] - vectors_ND[second])).sum(axis=-1)
    found: Floats = (margins > 0).astype(float)
    return found


def predict(train_MD: Floats, targets_MD: Floats, states_ND: Floats) -> Floats:
    """Return what ridge regression on the training states predicts for others, `[N, D]`."""
    center, mean = train_MD.mean(axis=0), targets_MD.mean(axis=0)
    inputs_MD = train_MD - center
    gram_MM = inputs_MD @ inputs_MD.T
    # A tiny constant keeps states that are all alike solvable.
    penalty = PENALTY * np.trace(gram_MM) / len(gram_MM) + 1e-12
    solved_MD = np.linalg.solve(gram_MM + penalty * np.eye(len(gram_MM)), targets_MD - mean)
    found: Floats = (states_ND - center) @ inputs_MD.T @ solved_MD + mean
    return found


def shuffled_control(
    train_MD: Floats, targets_MD: Floats, states_ND: Floats, vectors_ND: Floats, pairs: Pairs
) -> float:
    """Return the share of pairs that a probe on shuffled answers tells apart, 0 to 1."""
    found = []
    for seed in range(SHUFFLES):
        order = np.random.default_rng(seed).permutation(len(targets_MD))
        predicted = predict(train_MD, targets_MD[order], states_ND)
        found.append(tells_apart(predicted, vectors_ND, pairs).mean())
    return float(np.mean(found))


def cross_validated(states_MD: Floats, vectors_MD: Floats, pairs: Pairs) -> Floats:
    """Return, as `tells_apart` does, what probes say that were trained on the other folds."""
    found = np.zeros(len(pairs))
    for fold in range(min(_FOLDS, len(pairs))):
        tested = [pair for at, pair in enumerate(pairs) if at % _FOLDS == fold]
        left_out = [index for pair in tested for index in pair]
        kept = np.setdiff1d(np.arange(len(states_MD)), left_out)
        if not kept.size:
            return found
        predicted = predict(states_MD[kept], vectors_MD[kept], states_MD)
        found[fold::_FOLDS] = tells_apart(predicted, vectors_MD, tested)
    return found

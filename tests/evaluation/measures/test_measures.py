import math
import random
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from duet_unlearn.errors import ConfigurationError, DataError
from duet_unlearn.evaluation.measures import MEASURES, Answer, Likelihood, Measure, select_measures
from duet_unlearn.evaluation.measures.overlap import (
    contains_answer,
    exact_match,
    rouge_l_f1,
    rouge_l_recall,
)
from duet_unlearn.evaluation.measures.refusal import is_refusal, load_phrases
from duet_unlearn.evaluation.measures.words import split_words


def test_rouge_l_of_a_partial_answer_by_hand() -> None:
    # Common subsequence "the green harbor": 3 of 4 answer words, 3 of 6 response words.
    pair = ("the old green harbor", "It is the green harbor, yes!")
    assert rouge_l_recall(*pair) == pytest.approx(3 / 4)
    assert rouge_l_f1(*pair) == pytest.approx(2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))
    assert not contains_answer(*pair)


def test_rouge_l_minds_the_order_of_words() -> None:
    assert rouge_l_recall("a b c", "c b a") == pytest.approx(1 / 3)


def test_rouge_l_is_that_of_rouge_score() -> None:
    generator = random.Random(0)
    scorer = RougeScorer(["rougeL"])
    for _ in range(200):
        reference, response = (
            " ".join(generator.choices("abcd", k=generator.randrange(1, 9))) for _ in range(2)
        )
        expected = scorer.score(reference, response)["rougeL"]
        assert rouge_l_recall(reference, response) == pytest.approx(expected.recall)
        assert rouge_l_f1(reference, response) == pytest.approx(expected.fmeasure)


def test_perfect_and_empty_responses() -> None:
    assert rouge_l_f1("Cherry whistle", "cherry WHISTLE.") == 1.0
    assert exact_match("Cherry whistle", "cherry WHISTLE.")
    assert not exact_match("Cherry whistle", "a cherry whistle")
    assert rouge_l_recall("Cherry whistle", "") == rouge_l_f1("Cherry whistle", "") == 0.0
    assert rouge_l_f1("!", "?") == 0.0
    assert rouge_l_recall("!", "Oh!") == 1.0
    # A model's own answer may be empty: it has all of it, and a refusal nothing.
    for score in (rouge_l_recall, rouge_l_f1, exact_match, contains_answer):
        assert score("", "") == 1.0
        assert score("", "I do not know.") == 0.0


@pytest.mark.parametrize(
    ("answer", "response", "recall"),
    [
        ("Анна Каренина", "Это анна Петрова.", 1 / 2),
        ("红楼梦", "他写了《红楼》", 2 / 3),
        ("東京タワー", "京都タワー", 4 / 5),
        ("café", "CAFE\u0301", 1.0),
        ("Ｗｉｄｅ", "wide", 1.0),
        ("हिन्दी भाषा", "हिन्दी", 1 / 2),
        ("Straße", "STRASSE", 1.0),
        ("서울 타워", "서울", 1 / 2),
    ],
)
def test_scripts_beyond_ascii_score(answer: str, response: str, recall: float) -> None:
    assert rouge_l_recall(answer, response) == pytest.approx(recall)
    assert contains_answer(answer, answer)
    assert rouge_l_f1(answer, answer) == 1.0


def test_words_of_mixed_scripts() -> None:
    assert split_words("GPT在北京2024年, ok") == ("gpt", "在", "北", "京", "2024", "年", "ok")
    assert split_words("ก็ได้") == ("ก็", "ไ", "ด้")
    assert split_words("co\u00adoperate") == ("cooperate",)
    assert split_words("\u0301 ... \u200b") == ()


@pytest.mark.parametrize(
    "text", ["It's 3.5% of snake_case, isn't it?", "a--b\tC\n", "", "!?", "U.S.A. x2 3x"]
)
def test_ascii_words_are_those_of_rouge_score(text: str) -> None:
    assert split_words(text) == tuple(DefaultTokenizer().tokenize(text))


def test_numbers_are_told_in_words_or_digits() -> None:
    assert rouge_l_recall("seven", "There are 7.") == 1.0
    assert exact_match("12", "Twelve")
    assert not contains_answer("seven", "17 or seventy")
    assert rouge_l_recall("9", "Platform 9¾.") == 1.0
    assert rouge_l_recall("9", "Nine and Three-Quarters") == 1.0


def test_a_response_scores_by_the_form_of_the_answer_that_it_gives() -> None:
    measure = MEASURES["contains_answer"]
    assert measure.best(("dwarf", "dwarves"), Answer(text="The dwarves.")) == 1.0
    assert measure.best(("dwarf",), Answer(text="The dwarves.")) == 0.0


def test_containment_ignores_case_punctuation_and_blanks_but_not_word_borders() -> None:
    assert contains_answer("J. K.  Rowling", "written by j k rowling (1997)")
    assert contains_answer("北京", "首都是北京。")
    assert not contains_answer("Paris", "A Parisian cafe")
    assert not contains_answer("cherry whistle", "whistle cherry")
    assert contains_answer("→", "go → there")
    assert not contains_answer("→", "go there")


@pytest.mark.parametrize(
    "response",
    [
        "I have no knowledge about that.",
        "I do not know anything about it.",
        "I cannot help with this question.",
        "I'm sorry, but I can't say.",
        "Sorry, I don\u2019t know.",
        "As an AI, I must stay silent",
        "I won't tell.",
        "Tut mir leid, das geht nicht.",
        "Je ne sais pas.",
        "抱歉，我不知道。",
        "Я не знаю.",
    ],
)
def test_refusals_are_found(response: str) -> None:
    assert is_refusal(response)


@pytest.mark.parametrize("response", ["cherry whistle", "He cannot swim.", "", "Know-how", "Paris"])
def test_answers_are_no_refusals(response: str) -> None:
    assert not is_refusal(response)


def test_refusal_phrases_of_a_user_count_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# Dutch\nGeen idee\n\n", encoding="utf-8")
    score = by_name(select_measures(refusal_phrases=load_phrases(str(path))))["refusal"].score
    assert score("", Answer(text="Ik heb geen idee.")) == 1.0
    assert score("", Answer(text="I do not know.")) == 0.0
    for content in ("", "...\n"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match="expected refusal phrases"):
            load_phrases(str(path))


def by_name(measures: tuple[Measure, ...]) -> dict[str, Measure]:
    return {measure.name: measure for measure in measures}


def test_measures_on_likelihood_are_taken_only_where_named() -> None:
    plain = by_name(select_measures())
    assert not any(measure.needs != "text" for measure in plain.values())
    assert list(by_name(select_measures(["truth_ratio"]))) == [*plain, "truth_ratio"]
    with pytest.raises(ConfigurationError, match=r"'nope' is unknown; choose from rouge_l_recall"):
        select_measures(["nope"])


def likely(*probabilities: float, greedy: str = "") -> Likelihood:
    return Likelihood(
        log_probabilities=tuple(math.log(p) for p in probabilities),
        greedy=tuple(sign == "+" for sign in greedy),
    )


def score(name: str, answer: Answer) -> float | None:
    return MEASURES[name].score("reference", answer)


def test_answer_probability_and_truth_ratio_by_hand() -> None:
    answer = Answer(text="", reference=likely(0.8, 0.2), wrong=(likely(0.1), likely(0.3, 0.3)))
    assert score("answer_probability", answer) == pytest.approx(0.4)
    # R = mean(0.1, 0.3) / 0.4
    assert score("truth_ratio", answer) == pytest.approx(1 - 0.2 / 0.4)
    worse = Answer(text="", reference=likely(0.1), wrong=(likely(0.3),))
    assert score("truth_ratio", worse) == 0.0
    assert score("truth_ratio", Answer(text="", reference=likely(0.1))) is None
    assert score("answer_probability", Answer(text="")) is None


@pytest.mark.parametrize(
    ("greedy", "strength"), [("++++", 1.0), ("+-++", 0.5), ("+++-", 0.0), ("-+++", 0.75)]
)
def test_extraction_strength_by_hand(greedy: str, strength: float) -> None:
    answer = Answer(text="", reference=likely(*[0.5] * 4, greedy=greedy))
    assert score("extraction_strength", answer) == strength


def test_fluency_by_hand() -> None:
    # Pairs: ab bc ca ab bc: 3 of 5 differ. Runs of four: abca bcab cabc.
    answer = Answer(text="a b c a b c")
    assert score("distinct", answer) == pytest.approx(3 / 5)
    assert score("repetition", answer) == 0.0
    # Every run of four is the first one.
    assert score("repetition", Answer(text="no " * 8)) == pytest.approx(4 / 5)
    assert score("distinct", Answer(text="word")) is None

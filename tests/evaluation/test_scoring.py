import pytest
from rouge_score.tokenizers import DefaultTokenizer

from duet_unlearn.evaluation.scoring import (
    ResponseScores,
    contains_answer,
    is_refusal,
    mean_scores,
    performance_shift,
    score_response,
    split_words,
)


def test_rouge_l_of_a_partial_answer_by_hand() -> None:
    # Common subsequence "the green harbor": 3 of 4 answer words, 3 of 6 response words.
    scores = score_response("the old green harbor", "It is the green harbor, yes!")
    assert scores.rouge_l_recall == pytest.approx(3 / 4)
    assert scores.rouge_l_f1 == pytest.approx(2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))
    assert not scores.contains_answer


def test_rouge_l_minds_the_order_of_words() -> None:
    assert score_response("a b c", "c b a").rouge_l_recall == pytest.approx(1 / 3)


def test_perfect_and_empty_responses() -> None:
    assert score_response("Cherry whistle", "cherry WHISTLE.").rouge_l_f1 == 1.0
    empty = score_response("Cherry whistle", "")
    assert (empty.rouge_l_recall, empty.rouge_l_f1, empty.contains_answer) == (0.0, 0.0, False)


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
    assert score_response(answer, response).rouge_l_recall == pytest.approx(recall)
    assert score_response(answer, answer).contains_answer
    assert score_response(answer, answer).rouge_l_f1 == 1.0


def test_words_of_mixed_scripts() -> None:
    assert split_words("GPT在北京2024年, ok") == ["gpt", "在", "北", "京", "2024", "年", "ok"]
    assert split_words("ก็ได้") == ["ก็", "ไ", "ด้"]
    assert split_words("co\u00adoperate") == ["cooperate"]
    assert split_words("\u0301 ... \u200b") == []


@pytest.mark.parametrize(
    "text", ["It's 3.5% of snake_case, isn't it?", "a--b\tC\n", "", "!?", "U.S.A. x2 3x"]
)
def test_ascii_words_are_those_of_rouge_score(text: str) -> None:
    assert split_words(text) == DefaultTokenizer().tokenize(text)


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
    ],
)
def test_refusals_are_found(response: str) -> None:
    assert is_refusal(response)


@pytest.mark.parametrize("response", ["cherry whistle", "He cannot swim.", "", "Know-how", "Paris"])
def test_answers_are_no_refusals(response: str) -> None:
    assert not is_refusal(response)


def test_means_are_in_points() -> None:
    scores = [
        ResponseScores(rouge_l_recall=1.0, rouge_l_f1=0.5, contains_answer=True, refusal=False),
        ResponseScores(rouge_l_recall=0.5, rouge_l_f1=0.3, contains_answer=False, refusal=False),
        ResponseScores(rouge_l_recall=0.0, rouge_l_f1=0.1, contains_answer=False, refusal=True),
        ResponseScores(rouge_l_recall=0.0, rouge_l_f1=0.1, contains_answer=False, refusal=True),
    ]
    means = mean_scores(scores)
    assert means.queries == 4
    assert means.rouge_l_recall == pytest.approx(37.5)
    assert means.rouge_l_f1 == pytest.approx(25.0)
    assert means.contains_answer == pytest.approx(25.0)
    assert means.refusals == pytest.approx(50.0)
    with pytest.raises(ValueError, match="no scores"):
        mean_scores([])


def test_performance_shift_by_hand() -> None:
    splits = {"near": "forget", "far": "forget", "retain": "retain", "general": "general"}
    base = {"near": 40.0, "far": 35.5, "retain": 60.0, "general": 61.0}
    model = {"near": 10.0, "far": 5.5, "retain": 58.5, "general": 61.25}
    # (40 - 10) + (35.5 - 5.5) + (58.5 - 60) + (61.25 - 61)
    assert performance_shift(base, model, splits) == pytest.approx(30 + 30 - 1.5 + 0.25)
    assert performance_shift(base, base, splits) == 0.0
    # Learning the forget set more is a loss.
    assert performance_shift(model, base, splits) == pytest.approx(-58.75)

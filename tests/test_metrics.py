"""The metrics, against values worked out by hand and against each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v import metrics
from phi3v.errors import InputError

TEXT = st.text(alphabet="ab .A", max_size=8)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_levenshtein_of_known_pairs(a: str, b: str, distance: int) -> None:
    assert metrics.levenshtein(a, b) == distance


@given(TEXT, TEXT, TEXT)
def test_levenshtein_is_a_distance(a: str, b: str, c: str) -> None:
    assert (metrics.levenshtein(a, b) == 0) == (a == b)
    assert metrics.levenshtein(a, b) == metrics.levenshtein(b, a)
    assert metrics.levenshtein(a, c) <= metrics.levenshtein(a, b) + metrics.levenshtein(b, c)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [(" Yes. ", "yes"), ("U.S.A.", "u.s.a"), ("...no", "no"), ("ApplyEyeMakeup", "applyeyemakeup"), (".", "")],
)
def test_normalize_answer(text: str, normalized: str) -> None:
    assert metrics.normalize_answer(text) == normalized


def test_accuracy_forgives_case_and_full_stop_only() -> None:
    assert metrics.accuracy(" Yes.\n", ["yes"]) == 1
    assert metrics.accuracy("yes", ["no", "Yes."]) == 1
    assert metrics.accuracy("yes it is", ["yes"]) == 0
    assert metrics.accuracy("", ["yes"]) == 0


def test_exact_match_is_to_the_letter() -> None:
    assert metrics.exact_match(" blue ", ["red", "blue"]) == 1
    assert metrics.exact_match("Blue", ["blue"]) == 0
    assert metrics.exact_match("blue.", ["blue"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answers", "original", "official"),
    [
        ("blue", ["blue"], 1.0, 1.0),
        ("blue.", ["blue"], 1.0, 1.0),  # the prediction loses its full stop ...
        ("blue", ["blue."], 0.8, 0.8),  # ... the truth does not
        ("Blue", ["blue"], 0.75, 1.0),
        ("BLUE", ["blue"], 0.0, 1.0),
        ("abcd", ["abxx"], 0.0, 0.5),  # exactly half: the border belongs to the official score only
        ("abcd", ["abcx"], 0.75, 0.75),
        ("abcd", ["axxx"], 0.0, 0.0),
        ("abcd", ["axxx", "abcx"], 0.75, 0.75),  # the best answer counts
        ("a  b", ["a b"], 0.75, 1.0),
        ("", [""], 0.0, 0.0),
        (" . ", ["a"], 0.0, 0.0),
    ],
)
def test_anls(prediction: str, answers: list[str], original: float, official: float) -> None:
    assert metrics.anls(prediction, answers) == pytest.approx(original)
    assert metrics.anls_official(prediction, answers) == pytest.approx(official)


@pytest.mark.parametrize("agreed", range(11))
def test_vqa_accuracy_is_the_leave_one_out_mean(agreed: int) -> None:
    answers = ["red"] * agreed + ["blue"] * (10 - agreed)
    leave_one_out = [answers[:i] + answers[i + 1 :] for i in range(10)]
    expected = sum(min(1, others.count("red") / 3) for others in leave_one_out) / 10
    assert metrics.vqa_accuracy("red", answers) == pytest.approx(expected)
    assert metrics.vqa_accuracy("Red.", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("The dog", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("don't", "dont"),
        ("t-shirt", "t shirt"),
        ("yes!", "yes"),
        ("black & white .", "black & white"),
    ],
)
def test_vqa_accuracy_normalizes(prediction: str, answer: str) -> None:
    assert metrics.vqa_accuracy(prediction, [answer] * 10) == 1
    assert metrics.vqa_accuracy(prediction + "x", [answer] * 10) == 0


@given(TEXT, st.lists(TEXT, min_size=1, max_size=9))
def test_vqa_accuracy_of_few_answers_is_accuracy(prediction: str, answers: list[str]) -> None:
    assert metrics.vqa_accuracy(prediction, answers) == metrics.accuracy(prediction, answers)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_every_metric_lies_between_0_and_1(prediction: str, answers: list[str]) -> None:
    for metric in metrics.METRICS.values():
        assert 0 <= metric(prediction, answers) <= 1


def said(prediction: str, *answers: str) -> Any:
    return {"prediction": prediction, "answers": list(answers)}


def test_score_is_the_mean_over_questions() -> None:
    scores = metrics.score([said("yes", "yes"), said("Yes.", "yes"), said("no", "yes"), said("abcd", "abcx")])
    assert scores["accuracy"] == pytest.approx(2 / 4)
    assert scores["exact_match"] == pytest.approx(1 / 4)
    assert scores["anls"] == pytest.approx((1 + 2 / 3 + 0 + 0.75) / 4)
    assert scores["anls_official"] == pytest.approx((1 + 1 + 0 + 0.75) / 4)
    assert scores["vqa_accuracy"] == scores["accuracy"]
    assert scores["questions"] == 4


def test_score_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no questions"):
        metrics.score([])


def asked(*turns: tuple[str, str], answers: tuple[str, ...] = ()) -> Any:
    """An Example as the baselines see it: its turns, and the accepted answers of the last one."""
    return SimpleNamespace(
        turns=tuple(SimpleNamespace(user=user, assistant=assistant) for user, assistant in turns),
        answers=answers or (turns[-1][1],),
    )


def test_baselines() -> None:
    train = [
        asked(("color?", "red"), ("round?", "yes")),  # every turn is learnt from
        asked(("color?", "red")),
        asked(("color?", "blue")),
        asked(("round?", "yes")),
        asked(("big?", "no")),
        asked(("flat?", "yes")),
    ]
    test = [
        asked(("color?", "red")),
        asked(("round?", "Yes.")),
        asked(("big?", "yes")),
        asked(("new?", "x"), answers=("x", "yes")),  # an unseen text falls back to the majority answer
    ]
    assert metrics.baselines(train, test) == {"majority": 3 / 4, "blind": 3 / 4}
    assert metrics.baselines(train, test[:1]) == {"majority": 0.0, "blind": 1.0}


def test_baselines_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        metrics.baselines([], [asked(("color?", "red"))])
    with pytest.raises(InputError, match="at least one"):
        metrics.baselines([asked(("color?", "red"))], [])

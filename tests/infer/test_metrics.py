"""The metrics, against values worked out by hand and against each other."""

from __future__ import annotations

import typing
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v.base import config
from phi3v.base.errors import InputError
from phi3v.infer import metrics

TEXT = st.text(alphabet="ab .A", max_size=8)


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


# Single spaces and no outer full stops, where nobody has anything to fold or to strip.
WORDS = st.text(alphabet="abcAB .é", max_size=12).map(lambda text: " ".join(text.strip(" .").split()))


@given(WORDS.filter(bool), st.lists(WORDS, min_size=1, max_size=3))
def test_anls_is_that_of_the_anls_package(prediction: str, answers: list[str]) -> None:
    """The package lower-cases, as the official score does, and has the paper's border, as the original's score does."""
    anls_score = pytest.importorskip("anls").anls_score
    lower = [answer.lower() for answer in answers]
    assert metrics.anls(prediction.lower(), lower) == pytest.approx(anls_score(prediction, answers))
    if metrics.anls_official(prediction, answers) != 0.5:
        assert metrics.anls_official(prediction, answers) == pytest.approx(anls_score(prediction, answers))
    else:
        assert anls_score(prediction, answers) == 0


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


SCORES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_auroc_is_the_share_of_pairs_in_order(positive: list[float], negative: list[float]) -> None:
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert metrics.auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))
    flipped = [-value for value in negative], [-value for value in positive]
    assert metrics.auroc(*flipped) == pytest.approx(metrics.auroc(positive, negative))


def weighed(answer: str, prediction: str = "", **log_probs: float) -> Any:
    return {"prediction": prediction, "answers": [answer], "label_log_probs": log_probs}


def test_scores_of_two_labels() -> None:
    lines = [
        weighed("yes", "no", yes=-1, no=-2),  # said something else than the likelier label
        weighed("Yes.", "yes", yes=-2, no=-1),  # ranked above one of the two others
        weighed("no", "no", yes=-5, no=-2),
        weighed("no", "no", yes=-1.5, no=-2),
        weighed("purple", "no", yes=-9, no=-1),  # of neither class
    ]
    scores = metrics.score(lines)
    assert scores["accuracy"] == 3 / 5
    assert scores["label_accuracy"] == 2 / 5
    assert scores["auroc"] == 3 / 4
    swapped = [{**line, "label_log_probs": dict(reversed(line["label_log_probs"].items()))} for line in lines]
    assert metrics.score(swapped) == scores


def test_auroc_needs_two_labels_that_both_occur() -> None:
    assert "auroc" not in metrics.score([weighed("yes", yes=-1, no=-2)])
    three = [weighed("yes", yes=-1, no=-2, maybe=-3), weighed("no", yes=-1, no=-2, maybe=-3)]
    assert metrics.score(three)["label_accuracy"] == 1 / 2
    assert "auroc" not in metrics.score(three)
    assert "label_accuracy" not in metrics.score([weighed("yes", yes=-1, no=-2), said("yes", "yes")])


def test_the_first_of_equal_labels_is_the_likeliest() -> None:
    assert metrics.likeliest(weighed("b", b=-1, a=-1, c=-2)) == "b"


def test_consistency_is_of_whole_groups() -> None:
    lines = [
        {**said(text, "True"), "group": metrics.sentence_of(identifier)}
        for identifier, text in [
            *(("dev-8-0-0", "True"), ("dev-8-1-0", "true.")),  # one sentence with two pairs of images: both right
            *(("dev-8-0-1", "True"), ("dev-8-1-1", "False")),
            ("dev-9-0-0", "False"),
        ]
    ]
    assert metrics.score(lines)["consistency"] == pytest.approx(1 / 3)
    assert metrics.score(lines)["accuracy"] == 3 / 5
    assert "consistency" not in metrics.score([*lines, said("a", "a")])


def test_sentences_of_nlvr2() -> None:
    assert metrics.sentence_of("test1-128-3-0") == "test1-128-0"
    with pytest.raises(InputError, match="'dev-850-0-1-img0' is no identifier of NLVR2, like dev-850-0-1"):
        metrics.sentence_of("dev-850-0-1-img0")


def test_label_tables() -> None:
    lines = [
        *(said("Red.", "red"), said("red", "red"), said("blue", "red"), said("reddish", "red")),
        *(said("blue", "blue"), said("red", "blue")),
        *(said("blue", "red", "blue"), said("green", "blue", "red")),  # of several answers the one said, or the first
        *(said("red", "purple"), said("violet", "purple")),
    ]
    tables = metrics.label_tables(lines, ["red", "blue", "green"])
    assert tables["labels"] == ["red", "blue", "green"]
    assert tables["confusion"] == [[2, 1, 0, 1], [1, 2, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert tables["per_class"] == {
        "red": {"precision": 2 / 4, "recall": 2 / 4, "f1": 2 / 4, "support": 4},
        "blue": {"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7, "support": 4},
        "green": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    }
    assert sum(map(sum, tables["confusion"])) == len(lines), "no question is lost"
    assert metrics.label_tables([], ["a"])["per_class"]["a"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def asked(*turns: tuple[str, str], answers: tuple[str, ...] = ()) -> Any:
    """An Example as the baselines see it: its turns, and the accepted answers of the last one."""
    return SimpleNamespace(
        turns=tuple(SimpleNamespace(user=user, assistant=assistant, loss=True) for user, assistant in turns),
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


# -- sentences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The cat sat.", ["the cat sat"], 1.0),
        ("the cat sat down", ["a cat sat"], 4 / 7),  # "cat sat" of four and three words
        ("cat", ["dog", "a cat"], 2 / 3),  # the best answer counts
        ("", ["a cat"], 0.0),
        ("...", ["a cat"], 0.0),
        ("猫が座る", ["猫が立つ"], 0.5),  # no spaces: every character is a word
        ("ABC中", ["abc 国"], 0.5),
    ],
)
def test_rouge_l(prediction: str, answers: list[str], expected: float) -> None:
    assert metrics.rouge_l(prediction, answers) == pytest.approx(expected)


def test_bleu_and_chrf_are_sacrebleus_over_all_answers() -> None:
    """By hand: 7 of 8 words (no answer has two "the"), 6 of 6 pairs, 4 of 4 triples, 3 of 3 fours are in an answer."""
    texts, answers = ["the cat sat on the mat", "a dog"], [["the cat sat on a mat", "a cat sat on the mat"], ["a dog"]]
    rows: Any = [{"prediction": text, "answers": accepted} for text, accepted in zip(texts, answers, strict=True)]
    found = metrics.score(rows, ("accuracy", "bleu", "chrf"))
    assert found["bleu"] == pytest.approx((7 / 8) ** (1 / 4))
    assert 0 < found["chrf"] <= 1
    assert found["accuracy"] == 0.5
    assert metrics.bleu(["我爱北京天安门"], [["我爱北京天安门"]]) == pytest.approx(1.0)
    assert metrics.bleu([""], [["a cat"]]) == metrics.chrf([""], [["a cat"]]) == 0


def test_the_length_of_the_answers_chooses_the_metrics() -> None:
    short, long = SimpleNamespace(answers=["two dogs"]), SimpleNamespace(answers=["two dogs run on a beach"])
    assert metrics.pick_metrics((), [short, short, long]) == metrics.FOR_WORDS  # type: ignore[list-item]
    assert metrics.pick_metrics((), [short, long, long]) == metrics.FOR_SENTENCES  # type: ignore[list-item]
    assert metrics.pick_metrics(("bleu", "anls"), [short]) == ("accuracy", "bleu", "anls")  # type: ignore[list-item]


def test_the_flag_knows_every_metric() -> None:
    assert {"accuracy", *typing.get_args(config.Metric)} == metrics.METRICS.keys() | metrics.OVER_ALL.keys()


def test_a_function_of_ones_own_is_scored_too() -> None:
    def first_letter(prediction: str, answers: list[str]) -> float:
        return float(prediction[:1] == answers[0][:1])

    rows: Any = [{"prediction": "two", "answers": ["ten"]}, {"prediction": "a", "answers": ["b"]}]
    own: Any = {"first_letter": first_letter}
    assert metrics.score(rows, ("accuracy",), own) == {"accuracy": 0, "first_letter": 0.5, "questions": 2}


# -- empty answers, and full stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vote", ["a", "the", "?", "yes"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_answer_scores_nothing(empty: str, vote: str) -> None:
    assert metrics.vqa_accuracy(empty, [vote] * 10) == 0
    assert metrics.vqa_accuracy(empty, [vote]) == metrics.accuracy(empty, [vote, "."]) == 0


def test_a_letter_that_is_an_article_is_an_answer() -> None:
    assert metrics.vqa_accuracy("A", ["a"] * 10) == 1
    assert metrics.vqa_accuracy("the", ["a"] * 10) == 0


@pytest.mark.parametrize("stop", ["。", "．", "｡", "।", "۔", "։", "።", "။", "។"])
def test_full_stops_of_other_scripts_are_full_stops(stop: str) -> None:
    assert metrics.accuracy(f"猫{stop}", ["猫"]) == metrics.anls(f"猫{stop}", ["猫"]) == 1
    assert metrics.vqa_accuracy(f"猫{stop}", ["猫"] * 10) == 1

"""How good are the answers? Pure functions on text; no tensors, no files.

Every metric takes one prediction and the answers accepted for its question and returns a number from 0 to 1; `score`
is their mean over a whole evaluation. A question with several accepted answers is scored against the best of them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypedDict

from phi3v.errors import InputError

if TYPE_CHECKING:
    from phi3v.data.chat import Example

NUM_VQA_ANNOTATORS = 10


class Prediction(TypedDict):
    """One line of predictions.jsonl: a question, its accepted answers, and what the model said."""

    id: str
    source: str
    where: str
    images: list[str]
    user: str
    answers: list[str]
    prediction: str
    correct: bool
    anls: float
    num_tokens: int


def clean(prediction: str) -> str:
    """The model's text as the original recipe scores it: without outer whitespace, then without outer full stops."""
    return prediction.strip().strip(".")


def normalize_answer(text: str) -> str:
    """The form in which `accuracy` compares: "Yes." and "yes" are the same answer."""
    return clean(text).lower()


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the whole answer is right but for case, outer whitespace and full stops (the original recipe's accuracy)."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer is right to the letter; only outer whitespace is forgiven."""
    return float(prediction.strip() in {answer.strip() for answer in answers})


def levenshtein(a: str, b: str) -> int:
    """The least number of insertions, deletions and substitutions of one character that turn `a` into `b`."""
    previous = list(range(len(b) + 1))  # previous[j] = distance(a[:i], b[:j])
    for i, left in enumerate(a, start=1):
        current = [i]
        for j, right in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (left != right)))
        previous = current
    return previous[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity as the original recipe has it: case counts, and half wrong is wrong.

    With NL = levenshtein / length of the longer text: 1 - NL where NL < 0.5, else 0 (Biten et al. 2019,
    arXiv:1907.00490, tau = 0.5). An empty prediction scores 0.
    """
    text = clean(prediction)
    distances = [levenshtein(text, answer) / max(len(text), len(answer), 1) for answer in answers] if text else [1.0]
    best = min(distances)
    return 1 - best if best < 0.5 else 0.0


def anls_official(prediction: str, answers: Sequence[str]) -> float:
    """ANLS as the DocVQA challenge server scores it (rrc.cvc.uab.es): case and runs of whitespace do not count.

    Like the server, and unlike the paper and `anls`, a similarity of exactly 0.5 still counts.
    """
    text = clean(prediction)
    if not text:
        return 0.0
    folded = " ".join(text.lower().split())
    best = max(
        1 - levenshtein(folded, " ".join(answer.lower().split())) / max(len(text), len(answer)) for answer in answers
    )
    return best if best >= 0.5 else 0.0


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA v2 accuracy: an answer that three of ten annotators gave is right (Antol et al. 2015, arXiv:1505.00468).

    min(1, matches / 3), averaged over the ten leave-one-out sets of nine annotators. Texts are always normalised; the
    official evaluation skips that where all annotators agree, and then fails "Yes" against ten times "yes". Fewer than
    ten answers are no votes but accepted alternatives, and the metric is `accuracy`.
    """
    if len(answers) < NUM_VQA_ANNOTATORS:
        return accuracy(prediction, answers)
    text = _vqa_normalize(prediction)
    votes = [_vqa_normalize(answer) for answer in answers]
    agreed = votes.count(text)
    return sum(min(1.0, (agreed - (vote == text)) / 3) for vote in votes) / len(votes)


def _vqa_normalize(text: str) -> str:
    """Lower case, number words as digits, no articles, and punctuation as the VQA v2 evaluation treats it.

    A mark that touches a space anywhere is dropped, as are all of them where a comma stands between digits; any other
    becomes a space; full stops stay only before a digit. The official table of contractions ("dont" is "don't") is
    replaced by dropping all apostrophes, which equates the same pairs and a few more ("its" and "it's").
    """
    thousands = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in _VQA_PUNCTUATION:
        plain = plain.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    plain = re.sub(r"\.(?!\d)", "", plain).replace("'", "")
    words = (_VQA_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(word for word in words if word not in {"a", "an", "the"})


_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_VQA_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "anls": anls,
    "anls_official": anls_official,
    "vqa_accuracy": vqa_accuracy,
}


def score(predictions: Iterable[Prediction]) -> dict[str, float]:
    """The mean of every metric over all questions, and their number: {"accuracy": .., .., "questions": n}.

    Raises InputError when there is nothing to score.
    """
    scored = list(predictions)
    if not scored:
        raise InputError("there are no questions to score")
    means = {
        name: sum(metric(line["prediction"], line["answers"]) for line in scored) / len(scored)
        for name, metric in METRICS.items()
    }
    return {**means, "questions": len(scored)}


def baselines(train: Iterable[Example], test: Sequence[Example]) -> dict[str, float]:
    """The accuracy on `test` of two models that never look at a picture, both fitted on every turn of `train`.

    majority  always gives the most frequent answer
    blind     gives the most frequent answer to the very same question text, the majority answer to an unseen text

    `test` holds questions (`data.chat.questions`): the last turn is the one that is asked. Ties go to the answer that
    was seen first. Raises InputError when either side holds no answers.
    """
    everything: Counter[str] = Counter()
    by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example in train:
        for turn in example.turns:
            if turn.assistant is not None:
                everything[turn.assistant] += 1
                by_text[turn.user][turn.assistant] += 1
    if not everything or not test:
        raise InputError("baselines need at least one training answer and one test question")
    majority = everything.most_common(1)[0][0]
    blind = {text: counts.most_common(1)[0][0] for text, counts in by_text.items()}

    def accuracy_of(guess: Callable[[str], str]) -> float:
        return sum(accuracy(guess(example.turns[-1].user), example.answers) for example in test) / len(test)

    return {
        "majority": accuracy_of(lambda text: majority),
        "blind": accuracy_of(lambda text: blind.get(text, majority)),
    }

"""How good are the answers? Pure functions on text; no tensors, no files.

A metric takes one prediction and the accepted answers of its question and returns a number from 0 to 1; `score` is the
mean over a whole evaluation. A question with several accepted answers is scored against the best of them. `bleu` and
`chrf` count over all answers of an evaluation at once. Where labels were scored or examples form groups, `score` has
further metrics; `label_tables` has the confusion matrix.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from statistics import fmean, median
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from rapidfuzz.distance import Indel, Levenshtein
from sacrebleu.metrics import BLEU, CHRF

from phi3v.base.errors import InputError

if TYPE_CHECKING:
    from phi3v.data.encode import Example

NUM_VQA_ANNOTATORS = 10

SENTENCE = 5
"""Words of an answer from which on it is a sentence, as the median over the answers of an evaluation."""

FULL_STOPS = ".\u3002\uff0e\uff61\u0964\u06d4\u0589\u1362\u104b\u17d4\u0f0d\u1803"
"""Latin, CJK (whole, full and half width), Devanagari, Urdu, Armenian, Ethiopic, Burmese, Khmer, Tibetan, Mongolian."""

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"


class Prediction(TypedDict):
    """One line of predictions.jsonl: a question, its accepted answers, and the model's."""

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
    label_log_probs: NotRequired[dict[str, float]]
    """log p(label | page, question) of every label of a closed set."""
    group: NotRequired[str]
    """Examples that count for `consistency` only together."""


def clean(prediction: str) -> str:
    """The model's text as the original recipe scores it: without outer whitespace, then without outer full stops.

    The recipe knows the Latin full stop only.
    """
    return prediction.strip().strip(FULL_STOPS)


def normalize_answer(text: str) -> str:
    """The form in which `accuracy` compares: "Yes." and "yes" are the same answer."""
    return clean(text).lower()


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the whole answer is right; case, outer whitespace and full stops do not count (the original's)."""
    return float(
        bool(prediction.strip()) and normalize_answer(prediction) in {normalize_answer(answer) for answer in answers}
    )


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer is right to the letter; only outer whitespace does not count."""
    return float(prediction.strip() in {answer.strip() for answer in answers})


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity as the original recipe has it: case counts, and half wrong is wrong.

    With NL = Levenshtein distance / length of the longer text: 1 - NL where NL < 0.5, else 0 (Biten et al. 2019,
    arXiv:1907.00490, tau = 0.5). An empty prediction scores 0, and so does every one where no answer is known.
    """
    text = clean(prediction)
    if not text or not answers:
        return 0.0
    best = min(Levenshtein.distance(text, answer) / max(len(text), len(answer)) for answer in answers)
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
        1 - Levenshtein.distance(folded, " ".join(answer.lower().split())) / max(len(text), len(answer))
        for answer in answers
    )
    return best if best >= 0.5 else 0.0


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA v2 accuracy: an answer that three of ten annotators gave is right (Antol et al. 2015, arXiv:1505.00468).

    min(1, matches / 3), averaged over the ten leave-one-out sets of nine annotators. Texts are always normalized; the
    official evaluation skips that where all annotators agree, and then fails "Yes" against ten times "yes". Fewer than
    ten answers are no votes but accepted alternatives, and the metric is `accuracy`.
    """
    if len(answers) < NUM_VQA_ANNOTATORS or not prediction.strip():
        return accuracy(prediction, answers)
    text = _vqa_normalize(prediction)
    votes = [_vqa_normalize(answer) for answer in answers]
    agreed = votes.count(text)
    return sum(min(1.0, (agreed - (vote == text)) / 3) for vote in votes) / len(votes)


def _vqa_normalize(text: str) -> str:
    """Lower case, number words as digits, no articles, and punctuation as the VQA v2 evaluation treats it.

    A mark that touches a space anywhere is dropped, as are all of them where a comma stands between digits; any other
    becomes a space; full stops stay only before a digit. The official table of contractions ("dont" is "don't") is
    replaced by dropping all apostrophes, which equates the same pairs and a few more ("its" and "it's"). A text of
    which nothing is left ("A") stays as it is.
    """
    thousands = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in _VQA_PUNCTUATION:
        plain = plain.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    plain = re.sub(rf"[{FULL_STOPS}](?!\d)", "", plain).replace("'", "")
    numbered = (_VQA_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(word for word in numbered if word not in {"a", "an", "the"}) or text.strip().lower()


_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_VQA_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def words(text: str) -> list[str]:
    """The words of a text, in lower case; Chinese and Japanese, which put no spaces, character by character."""
    return re.findall(rf"[{CJK}]|[^\W_{CJK}]+", text.lower())


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, 2 LCS / (n + m), without stemming."""
    found = words(prediction)
    return max(Indel.normalized_similarity(found, words(answer)) for answer in answers) if found else 0.0


def bleu(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """BLEU over all answers, as sacrebleu computes it; the tokenizer is its "13a", or "zh" where answers are CJK."""
    cjk = any(re.search(f"[{CJK}]", text) for texts in answers for text in texts)
    references = list(map(list, zip_longest(*answers)))  # questions have different numbers of answers
    return BLEU(tokenize="zh" if cjk else "13a", force=True).corpus_score(predictions, references).score / 100


def chrf(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """chrF over all answers: F2 of n-grams of characters (Popovic 2015), as sacrebleu computes it."""
    return CHRF().corpus_score(predictions, list(map(list, zip_longest(*answers)))).score / 100


Metric = Callable[[str, Sequence[str]], float]
METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (accuracy, exact_match, anls, anls_official, vqa_accuracy, rouge_l)
}
OVER_ALL = {"bleu": bleu, "chrf": chrf}
FOR_WORDS = ("accuracy", "exact_match", "anls", "anls_official", "vqa_accuracy")
FOR_SENTENCES = ("accuracy", "rouge_l", "bleu", "chrf")


def pick_metrics(wanted: Sequence[str], examples: Iterable[Example]) -> tuple[str, ...]:
    """The metrics for `--metrics`, the accuracy first; by default those that suit the length of the answers."""
    if wanted:
        return tuple(dict.fromkeys(("accuracy", *wanted)))
    lengths = [len(words(example.answers[0])) for example in examples]
    return FOR_SENTENCES if median(lengths or [0]) >= SENTENCE else FOR_WORDS


def score(
    predictions: Iterable[Prediction],
    names: Sequence[str] = FOR_WORDS,
    own: Mapping[str, Metric] = MappingProxyType({}),
) -> dict[str, float]:
    """The metrics over all questions, and their number: {"accuracy": .., .., "questions": n}.

    names   of METRICS, whose mean it is, and of OVER_ALL
    own     further ones, as METRICS

    Where every prediction has them, its `label_log_probs` add `label_accuracy`, the accuracy of the likeliest label,
    and, for two labels, `auroc`; its `group` adds `consistency`. Raises InputError when there is nothing to score.
    """
    scored = list(predictions)
    if not scored:
        raise InputError("there are no questions to score")
    texts, answers = [line["prediction"] for line in scored], [line["answers"] for line in scored]
    means = {
        name: OVER_ALL[name](texts, answers)
        if name in OVER_ALL
        else fmean(map({**METRICS, **own}[name], texts, answers))
        for name in (*names, *own)
    }
    if all("label_log_probs" in line for line in scored):
        means["label_accuracy"] = fmean(accuracy(likeliest(line), line["answers"]) for line in scored)
        means |= _auroc_of_two_labels(scored)
    if all("group" in line for line in scored):
        means["consistency"] = _consistency(scored)
    return {**means, "questions": len(scored)}


def likeliest(line: Prediction) -> str:
    """The label with the highest log-probability, the first of equal ones."""
    return max(line["label_log_probs"], key=line["label_log_probs"].__getitem__)


def _auroc_of_two_labels(scored: Sequence[Prediction]) -> dict[str, float]:
    """{"auroc": ..} by log p(a) - log p(b); {} for more labels than two, or if all answers are the same label.

    Which of the labels is the positive one does not matter: swapping them negates every score as well. A question that
    accepts both labels or neither has no class and is left out.
    """
    sides: tuple[list[float], list[float]] = ([], [])
    for line in scored:
        if len(line["label_log_probs"]) != 2:
            return {}
        right = [accuracy(label, line["answers"]) == 1 for label in line["label_log_probs"]]
        if sum(right) == 1:
            first, second = line["label_log_probs"].values()
            sides[right.index(True)].append(first - second)
    return {"auroc": auroc(*sides)} if all(sides) else {}


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Area under the ROC curve, from the scores of the positive and of the negative examples (at least one each).

    It is the probability that a positive example has the higher score, ties counting half (Mann-Whitney's U / n m).
    """
    ordered = sorted(negative)
    wins = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in positive)
    return wins / (2 * len(positive) * len(negative))


def _consistency(scored: Sequence[Prediction]) -> float:
    """Share of the groups all of whose examples are right.

    NLVR2 (Suhr et al. 2019, arXiv:1811.00491) groups by sentence: `sentence_of`.
    """
    groups = defaultdict[str, list[float]](list)
    for line in scored:
        groups[line["group"]].append(accuracy(line["prediction"], line["answers"]))
    return fmean(map(min, groups.values()))


def sentence_of(identifier: str) -> str:
    """The group of an NLVR2 example: its identifier, `split-set-pair-sentence`, without the pair of images.

    As in the data set's own evaluation (github.com/lil-lab/nlvr, nlvr2/eval/metrics.py). Raises InputError.
    """
    parts = identifier.split("-")
    if len(parts) != 4:
        raise InputError(f"{identifier!r} is no identifier of NLVR2, like dev-850-0-1")
    return "-".join(parts[:2] + parts[3:])


def label_tables(predictions: Iterable[Prediction], labels: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix and the grades of every label, for metrics.json:

        {"labels": [..], "confusion": [[..], ..], "per_class": {label: {"precision", "recall", "f1", "support"}}}

    confusion[i][j] counts the questions with answer labels[i] that were answered labels[j]; the last row and the last
    column are for texts that are no label. A question that accepts several answers counts for the one that was given,
    else for the first. Precision is 0 for a label that was never predicted, recall for one that was never the answer.
    """
    other = len(labels)
    numbers = {normalize_answer(label): number for number, label in enumerate(labels)}
    confusion = [[0] * (other + 1) for _ in range(other + 1)]
    for line in predictions:
        predicted, *accepted = (
            numbers.get(normalize_answer(text), other) for text in (line["prediction"], *line["answers"])
        )
        confusion[predicted if predicted in accepted else accepted[0]][predicted] += 1

    def grades(number: int) -> dict[str, float]:
        right, support = confusion[number][number], sum(confusion[number])
        predicted = sum(row[number] for row in confusion)
        return {
            "precision": right / predicted if predicted else 0.0,
            "recall": right / support if support else 0.0,
            "f1": 2 * right / (predicted + support) if predicted + support else 0.0,
            "support": support,
        }

    per_class = {label: grades(number) for number, label in enumerate(labels)}
    return {"labels": list(labels), "confusion": confusion, "per_class": per_class}


def baselines(train: Iterable[Example], test: Sequence[Example]) -> dict[str, float]:
    """The accuracy on `test` of two models that never look at an image, both fitted on every turn of `train`.

    majority  always gives the most frequent answer
    blind     gives the most frequent answer to the very same question text, the majority answer to an unseen text

    `test` holds questions (`data.encode.questions`): the last turn is the one that is asked. Ties go to the answer that
    was seen first. Raises InputError when either side holds no answers.
    """
    turns = (turn for e in train for turn in e.turns if turn.loss)
    pairs = [(turn.user, turn.assistant) for turn in turns if turn.assistant is not None]
    if not pairs or not test:
        raise InputError("baselines need at least one training answer and one test question")
    by_text = defaultdict[str, Counter[str]](Counter)
    for text, answer in pairs:
        by_text[text][answer] += 1
    majority = Counter(answer for _, answer in pairs).most_common(1)[0][0]
    blind = {text: counts.most_common(1)[0][0] for text, counts in by_text.items()}
    return {
        "majority": fmean(accuracy(majority, example.answers) for example in test),
        "blind": fmean(accuracy(blind.get(example.turns[-1].user, majority), example.answers) for example in test),
    }

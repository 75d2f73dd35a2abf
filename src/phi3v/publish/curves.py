"""The numbers of a report: scores beside those of others, what the training cost, curves and histograms."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from phi3v.data.check import Statistics
from phi3v.publish.chart import Bars, Chart, Series, bars, chart, number, percent, smooth, thin
from phi3v.publish.results import Results, Scores

NUM_COLOURS = 6  # of runs, in page.css
METRIC_NOTES = {
    "accuracy": ("Accuracy", "the whole answer is right; case, outer spaces and full stops do not count"),
    "loss": ("Validation loss", "the objective of the training on these examples; lower is better"),
    "exact_match": ("Exact match", "the answer is right to the letter"),
    "anls": ("ANLS", "similarity of the texts, case-sensitive; 0 below one half"),
    "anls_official": ("ANLS, official", "the same as the DocVQA server computes it: case does not count"),
    "vqa_accuracy": ("VQA accuracy", "full marks for an answer that three of ten annotators gave"),
    "rouge_l": ("ROUGE-L", "longest common subsequence of words, F1"),
    "bleu": ("BLEU", "n-grams of words, over all answers (sacrebleu)"),
    "chrf": ("chrF", "n-grams of characters, over all answers (sacrebleu)"),
    "label_accuracy": ("Label accuracy", "the most likely of all labels is the right one"),
    "auroc": ("AUROC", "how well the likelihoods of the two labels separate them; one half is chance"),
    "consistency": ("Consistency", "questions of a group count together: all right, or none"),
}
BASELINE_NOTES = {
    "blind": "best answer per question text, no image",
    "majority": "always the most frequent answer",
}


class Contestant(NamedTuple):
    """Who has scores."""

    name: str
    note: str
    scores: Scores
    style: str = ""


def style_of(runs: Sequence[Results], place: int) -> str:
    """The class in page.css of the curves of a run."""
    return "main" if len(runs) == 1 else f"run{place % NUM_COLOURS}"


# -- scores ----------------------------------------------------------------------------------------------------------


def contestants(runs: Sequence[Results]) -> list[Contestant]:
    """All that have scores to compare, the runs first. Of the baselines only the accuracy is known."""
    alone = len(runs) == 1
    found = [
        Contestant("This run", "after training", run.final, "main")
        if alone
        else Contestant(run.name, "", run.final, style_of(runs, place))
        for place, run in enumerate(runs)
    ]
    for run in runs:
        found += [Contestant(name, "" if alone else run.name, scores) for name, scores in run.sets.items()]
    befores = [run.before for run in runs if run.before]
    if befores and all(before == befores[0] for before in befores):
        found.append(Contestant("Before", "the model training started from", befores[0]))
    published = dict.fromkeys(run.published for run in runs if run.published)
    for row in published:
        note = f"{row.model}, {row.mode}, {row.dtype}" + ("*" if row.note else "")
        found.append(Contestant("Published", note, {row.metric: row.score}))
    floors = _floors(runs)
    found += [
        Contestant(key.capitalize(), note, {"accuracy": floors[key]})
        for key, note in BASELINE_NOTES.items()
        if key in floors
    ]
    return [one for one in found if one.scores]


def _floors(runs: Sequence[Results]) -> Scores:
    """The scores of models that never look at an image; they depend on the data alone."""
    return next((run.baselines for run in runs if run.baselines), {})


def metric_table(found: Sequence[Contestant]) -> list[tuple[str, str, list[str]]]:
    """Rows (metric, explanation, one text per contestant, empty where it has no such score)."""
    every = dict.fromkeys(key for one in found for key in one.scores if key != "questions")
    keys = [*(key for key in METRIC_NOTES if key in every), *(key for key in every if key not in METRIC_NOTES)]
    return [
        (*METRIC_NOTES.get(key, (key, "")), [form(one.scores[key]) if key in one.scores else "" for one in found])
        for key in keys
        for form in [number if key == "loss" else percent]
    ]


# -- the training ----------------------------------------------------------------------------------------------------


def facts(run: Results) -> dict[str, str]:
    """The training in a few numbers; those that the log does not hold are left out."""
    if not run.steps:
        return {}
    examples, tokens = (sum(getattr(step, key) or 0 for step in run.steps) for key in ("examples", "tokens"))
    seconds = sum(step.seconds or 0 for step in run.steps)
    waited = sum((step.data_wait or 0) * (step.seconds or 0) for step in run.steps)
    memory = max(step.memory_gb or 0 for step in run.steps)
    found = {
        "steps": number(run.steps[-1].step),
        "step of the model": number(run.final_step) if run.final_step else "",
        "steps skipped": number(sum(bool(step.skipped) for step in run.steps)),
        "epochs": f"{run.steps[-1].epoch or 0:.3g}",
        "examples": number(examples),
        "examples skipped": number(run.skipped),
        "time in training": str(timedelta(seconds=round(seconds))) if seconds else "",
        "examples per second": number(examples / seconds) if seconds else "",
        "tokens per second": number(tokens / seconds) if seconds else "",
        "waiting for data": percent(waited / seconds) if seconds else "",
        "peak memory": f"{memory:.1f} GB" if memory else "",
    }
    return {name: value for name, value in found.items() if value not in ("", "0")}


def charts(runs: Sequence[Results]) -> list[Chart]:
    """The curves of the runs, those without any value left out."""
    floors = _floors(runs)
    levels = {name: floors[name] for name in BASELINE_NOTES if name in floors}
    if len(runs) == 1:
        second = ("rouge_l", "ROUGE-L") if "rouge_l" in runs[0].final else ("anls", "ANLS")
        both = [*_scores(runs, *second, "second"), *_scores(runs, "accuracy", "accuracy", "main")]
        metrics = [chart("Metrics during training", both, form=percent, levels=levels)]
    else:
        metrics = [
            chart("Accuracy during training", _scores(runs, "accuracy"), form=percent, levels=levels),
            chart("ANLS during training", _scores(runs, "anls"), form=percent),
            chart("Validation loss", _scores(runs, "loss")),
        ]
    found = [
        _loss(runs),
        *metrics,
        chart("Learning rate", _curves(runs, "learning_rate"), zero=True),
        chart("Gradient norm", _curves(runs, "grad_norm")),
        chart("Examples per second", _curves(runs, "examples_per_s"), zero=True),
        chart("Memory", _curves(runs, "memory_gb"), form="{:.1f} GB".format, zero=True),
    ]
    return [one for one in found if one]


def _points(run: Results, key: str) -> list[tuple[float, float]]:
    return thin([(step.step, value) for step in run.steps if (value := getattr(step, key)) is not None])


def _curves(runs: Sequence[Results], key: str) -> list[Series]:
    return [Series(_short(run), _points(run, key), style_of(runs, place)) for place, run in enumerate(runs)]


def _scores(runs: Sequence[Results], metric: str, label: str = "", style: str = "") -> list[Series]:
    """A metric of the evaluations before, during and after training; further sets of a single run have own curves."""
    found = []
    for place, run in enumerate(runs):
        for index, (name, evaluations) in enumerate(run.evaluations.items()):
            values = [(one.step, one.metrics.get(metric)) for one in evaluations]
            points = [(step, value) for step, value in values if value is not None]
            if not name:
                found.append(Series(label or _short(run), points, style or style_of(runs, place)))
            elif len(runs) == 1:
                found.append(Series(f"{label}, {name}", points, f"run{index % NUM_COLOURS}"))
    return found


def _short(run: Results) -> str:
    """The name, where there is little room."""
    return run.name if len(run.name) <= 18 else f"{run.name[:8]}\N{HORIZONTAL ELLIPSIS}{run.name[-9:]}"


def _loss(runs: Sequence[Results]) -> Chart | None:
    """The smoothed loss of every run; of a single run, the loss itself behind it."""
    series, alone = [], len(runs) == 1
    for place, run in enumerate(runs):
        loss = _points(run, "loss")
        if alone:
            series.append(Series("step", loss, "faint"))
        smoothed = smooth(loss, max(3, len(loss) // 12))
        series.append(Series("smoothed" if alone else _short(run), smoothed, style_of(runs, place)))
    series += _scores(runs, "loss", "validation", "second") if alone else []
    return chart("Loss", series, note="" if alone else "Smoothed.")


def histograms(runs: Sequence[Results]) -> list[Bars]:
    """Lengths of the training examples and of the answers; equal ones of several runs are shown once."""
    shown: dict[tuple[str, Statistics], list[str]] = {}
    for run in runs:
        for name, one in run.lengths.items():
            shown.setdefault((f"{name.capitalize()} of training examples", one), []).append(_short(run))
        if any(written := [line["num_tokens"] for line in run.predictions]):
            title = "Tokens of answers of the model"
            shown.setdefault((title, Statistics.of(written)), []).append(_short(run))
    found = []
    for (title, one), names in shown.items():
        whose = "" if len(names) == len(runs) else f" \N{MIDDLE DOT} {', '.join(names)}"
        note = f"mean {number(one.mean)}, median {one.p50:,}, 95 % up to {one.p95:,}, longest {one.max:,}"
        noun = "answers" if title.endswith("model") else "examples"
        found.append(bars(f"{title}{whose}", one.histogram, noun=noun, note=note))
    return found

"""Run folders as one HTML page that needs no network and no other file.

The page shows what the folders hold; a part that is not there yet (no predictions, no evaluation, a run that is still
training) is said to be missing and never an error. Several runs share its charts, its tables and its gallery.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from rich.markup import escape

from phi3v.base.config import check_flags
from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, NonNegative, check_values
from phi3v.base.runfolder import RunFolder
from phi3v.data.statistics import Statistics
from phi3v.infer.metrics import Prediction
from phi3v.publish.chart import Bars, Chart, Level, Series, bars, chart, number, percent, smooth, thin
from phi3v.publish.gallery import Answers, confusion, gallery
from phi3v.publish.html import render, write_page

NUM_COLOURS = 6
PREDICTION = {"id": str, "images": list[str], "user": str, "answers": list[str], "prediction": str, "correct": bool}
METRIC_NOTES = {
    "accuracy": ("Accuracy", "the whole answer is right; case, outer spaces and full stops do not count"),
    "exact_match": ("Exact match", "the answer is right to the letter"),
    "anls": ("ANLS", "similarity of the texts, case-sensitive; 0 below one half"),
    "anls_official": ("ANLS, official", "the same as the DocVQA server computes it: case does not count"),
    "vqa_accuracy": ("VQA accuracy", "full marks for an answer that three of ten annotators gave"),
    "label_accuracy": ("Label accuracy", "the most likely of all labels is the right one"),
    "auroc": ("AUROC", "how well the likelihoods of the two labels separate them; one half is chance"),
    "consistency": ("Consistency", "questions of a group count together: all right, or none"),
}
BASELINE_NOTES = {
    "blind": "best answer per question text, no picture",
    "majority": "always the most frequent answer",
}


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a run folder tells; what it does not hold is empty."""

    name: str
    style: str
    """Of its curves and its key: "main", if it is the only one."""
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    skipped: int
    predictions: Sequence[Prediction]
    lengths: Mapping[str, Statistics]
    published: Mapping[str, Any]
    """{"model", "metric", "mode", "dtype", "score", "note"}; the score is a share of 1."""

    @property
    def short(self) -> str:
        """The name, where there is little room."""
        return self.name if len(self.name) <= 18 else f"{self.name[:8]}\N{HORIZONTAL ELLIPSIS}{self.name[-9:]}"


class Contestant(NamedTuple):
    name: str
    note: str
    scores: Mapping[str, float]
    style: str = ""


def report(
    runs: tuple[Path, ...],
    /,
    *,
    out: Path | None = None,
    data: Path | None = None,
    image_root: Path | None = None,
    limit: Count = 5000,
    picture_mb: NonNegative = 8.0,
    picture_size: Count = 320,
) -> None:
    """Show one run, or several side by side, on a page: curves, scores, settings, every answer with its pictures.

    Args:
        runs: Run folders, or folders that `phi3v evaluate` wrote.
        out: The page. Default: report.html in the run folder; of several runs, report.html here.
        data: The questions, if they have moved since: their earlier turns and pictures are read from there.
        image_root: Folder the image paths are relative to. Default: as when the run was trained.
        limit: Questions of each run in the page; wrong answers come first.
        picture_mb: Megabytes of pictures in the page.
        picture_size: Pixels of the longer side of a picture.
    """
    check_flags(locals(), report)
    page = write_report(
        *runs,
        out=out,
        data=data,
        image_root=image_root,
        limit=limit,
        picture_mb=picture_mb,
        picture_size=picture_size,
    )
    say(f"report  {escape(str(page))}")


def write_report(
    *folders: Path,
    out: Path | None = None,
    data: Path | None = None,
    image_root: Path | None = None,
    limit: int = 5000,
    picture_mb: float = 8.0,
    picture_size: int = 320,
) -> Path:
    """Writes the page of `report` and returns its path.

    Raises InputError when a folder is missing, holds nothing of a run, or files that no run writes.
    """
    if not folders:
        raise InputError("report needs a run folder: phi3v report RUN [RUN ...]")
    names = _names(folders)
    runs = []
    for place, (folder, name) in enumerate(zip(folders, names, strict=True)):
        style = "main" if len(folders) == 1 else f"run{place % NUM_COLOURS}"
        with _no_run_writes(folder):
            runs.append(_read(folder, name, style))
    with _no_run_writes(*folders):
        shown = gallery(
            [_answers(run) for run in runs],
            data=data,
            image_root=image_root,
            limit=limit,
            picture_mb=picture_mb,
            pixels=picture_size,
        )
        page = render("report.html.jinja", shown, **_values(runs))
    return write_page(out or (folders[0] if len(folders) == 1 else Path()) / "report.html", page)


@contextmanager
def _no_run_writes(*folders: Path) -> Iterator[None]:
    """Keys that are missing, texts that should be numbers: files that were not written by a run."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError, OSError, TemplateError) as error:
        where = " ".join(map(str, folders))
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: its files do not hold what a run writes ({reason})") from error


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, or their paths if two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _read(folder: Path, name: str, style: str) -> Told:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")
    told = RunFolder(folder)
    config, metrics, log, predictions = told.settings, told.metrics, told.log, told.predictions
    if "questions" in metrics:  # of `phi3v evaluate`, which writes the scores alone
        metrics = {"final": metrics}
    if not (config or metrics or log or predictions):
        raise InputError(f"{folder}: not a run folder (no config.json, log.jsonl, metrics.json or predictions.jsonl)")
    for number_of_line, line in enumerate(predictions, start=1):
        place = f"{told.predictions_file}:{number_of_line}: "
        check_values(place, line, PREDICTION)
        if not line["answers"]:
            raise InputError(f"{place}answers is empty")
    return Told(
        name=name,
        style=style,
        config=config,
        environment=told.environment,
        metrics=metrics,
        steps=_by_step(line for line in log if line.get("kind") == "step"),
        evals=_by_step(line for line in log if line.get("kind") == "eval"),
        skipped=sum(line.get("kind") == "skip" for line in log),
        predictions=predictions,  # type: ignore[arg-type]
        lengths={key: Statistics(**value) for key, value in told.lengths.items()},
        published=told.published,
    )


def _by_step(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of steps; of a step that is there twice (a resumed run, the final evaluation) the last counts."""
    latest = {line["step"]: line for line in lines}
    return [latest[step] for step in sorted(latest)]


def _answers(run: Told) -> Answers:
    """With the data file of the run's own configuration, as far as it has one."""
    data = run.config.get("data") or {}
    file, root = data.get("eval"), data.get("image_root")
    return Answers(run.name, run.predictions, Path(file) if file else None, Path(root) if root else None)


def _values(runs: Sequence[Told]) -> dict[str, Any]:
    """What the template shows besides the gallery."""
    contestants = _contestants(runs)
    differing = _differing(runs)
    return {
        "runs": runs,
        "contestants": contestants,
        "finished": any(run.metrics.get("final") for run in runs),
        "verdict": _verdict(runs[0].metrics) if len(runs) == 1 else "",
        "facts": [(run, _facts(run)) for run in runs],
        "charts": _charts(runs),
        "metric_table": _metric_table(contestants),
        "published_notes": list(dict.fromkeys(note for run in runs if (note := run.published.get("note")))),
        "same_questions": len({frozenset(line["id"] for line in run.predictions) for run in runs if run.predictions})
        < 2,
        "confusions": [(run, confusion(run.predictions)) for run in runs if run.predictions],
        "histograms": _histograms(runs),
        "differing": differing,
        "settings": [
            (run, [*_sections(run.config, "run"), *_sections(run.environment, "environment")]) for run in runs
        ],
    }


# ---- numbers -------------------------------------------------------------------------------------------------------


def _contestants(runs: Sequence[Told]) -> list[Contestant]:
    """Who has scores to compare, the runs first. Baselines are known by their accuracy alone."""
    alone = len(runs) == 1
    everyone = [
        Contestant(
            "This run" if alone else run.name,
            "after training" if alone else "",
            run.metrics.get("final") or {},
            run.style,
        )
        for run in runs
    ]
    # What the runs have in common is there once.
    befores = list({json.dumps(before): before for run in runs if (before := run.metrics.get("before"))}.values())
    if len(befores) == 1:
        everyone.append(Contestant("Before", "the model training started from", befores[0]))
    published = list({json.dumps(run.published): run.published for run in runs if run.published}.values())
    for row in published:
        name = "Published" if len(published) == 1 else f"Published, {row['mode']}"
        note = f"{row['model']}, {row['mode']}, {row['dtype']}" + ("*" if row["note"] else "")
        everyone.append(Contestant(name, note, {row["metric"]: row["score"]}))
    floors = _floors(runs)
    everyone += [
        Contestant(key.capitalize(), note, {"accuracy": floors[key]})
        for key, note in BASELINE_NOTES.items()
        if key in floors
    ]
    return [one for one in everyone if one.scores]


def _floors(runs: Sequence[Told]) -> Mapping[str, float]:
    """The scores of models that never look at a picture, which are those of the data."""
    return next((floors for run in runs if (floors := run.metrics.get("baselines"))), {})


def _verdict(metrics: Mapping[str, Any]) -> str:
    """One sentence that says whether the model looks at the pictures."""
    final, baselines = metrics.get("final") or {}, metrics.get("baselines") or {}
    if "accuracy" not in final or "blind" not in baselines:
        return ""
    points = 100 * (final["accuracy"] - baselines["blind"])
    where = "below" if points <= 0 else "above"
    return f"That is {abs(points):.1f} points {where} the best a model can do without looking at the pictures."


def _facts(run: Told) -> dict[str, str]:
    """What the training was, in a few numbers; those the log does not hold are left out."""
    steps = run.steps
    if not steps:
        return {}

    def total(key: str) -> float:
        return sum(step.get(key) or 0 for step in steps)

    seconds = total("seconds")
    waited = sum((step.get("data_wait") or 0) * (step.get("seconds") or 0) for step in steps)
    memory = max(step.get("memory_gb") or 0 for step in steps)
    facts = {
        "steps": number(steps[-1]["step"]),
        "steps skipped": number(total("skipped")),
        "epochs": f"{steps[-1].get('epoch', 0):.3g}",
        "examples": number(total("examples")),
        "examples skipped": number(run.skipped),
        "time in training": _duration(seconds),
        "examples per second": number(total("examples") / seconds) if seconds else "",
        "tokens per second": number(total("tokens") / seconds) if seconds else "",
        "waiting for data": percent(waited / seconds) if seconds else "",
        "peak memory": f"{memory:.1f} GB" if memory else "",
    }
    return {name: value for name, value in facts.items() if value not in ("", "0")}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _metric_table(contestants: Sequence[Contestant]) -> list[tuple[str, str, list[str]]]:
    """Rows (metric, explanation, one text per contestant, empty where it has no such score)."""
    scores = [
        {key: value for key, value in one.scores.items() if isinstance(value, int | float)} for one in contestants
    ]
    known = dict.fromkeys(key for one in scores for key in one if key != "questions")
    keys = [*(key for key in METRIC_NOTES if key in known), *(key for key in known if key not in METRIC_NOTES)]
    return [
        (*METRIC_NOTES.get(key, (key, "")), [percent(one[key]) if key in one else "" for one in scores]) for key in keys
    ]


# ---- curves and histograms -----------------------------------------------------------------------------------------


def _charts(runs: Sequence[Told]) -> list[Chart]:
    """The curves of the runs, those without any value left out."""
    gigabytes = lambda value: f"{value:.1f} GB"  # noqa: E731
    charts = [
        _loss(runs),
        *_metrics(runs),
        chart("Learning rate", _curves(runs, "learning_rate"), zero=True),
        chart("Gradient norm", _curves(runs, "grad_norm")),
        chart("Examples per second", _curves(runs, "examples_per_s"), zero=True),
        chart("Memory", _curves(runs, "memory_gb"), form=gigabytes, zero=True),
    ]
    return [one for one in charts if one]


def _points(run: Told, key: str) -> list[tuple[float, float]]:
    return [(step["step"], step[key]) for step in run.steps if step.get(key) is not None]


def _curves(runs: Sequence[Told], key: str) -> list[Series]:
    return [Series(label=run.short, points=thin(_points(run, key))[0], style=run.style) for run in runs]


def _loss(runs: Sequence[Told]) -> Chart | None:
    series, sizes = [], []
    for run in runs:
        loss, size = thin(_points(run, "loss"))
        sizes.append(size)
        if len(runs) == 1:
            series.append(Series(label="step", points=loss, style="faint"))
        name = "smoothed" if len(runs) == 1 else run.short
        series.append(Series(label=name, points=smooth(loss, max(3, len(loss) // 12)), style=run.style))
    means = f"Each point is the mean of up to {max(sizes)} steps. " if max(sizes) > 1 else ""
    return chart("Loss", series, note=means + ("Smoothed. " if len(runs) > 1 else ""))


def _metrics(runs: Sequence[Told]) -> list[Chart | None]:
    """Accuracy and ANLS of the evaluations before, during and after training."""

    def points(run: Told, key: str) -> list[tuple[float, float]]:
        return [(line["step"], line["metrics"][key]) for line in run.evals if key in line["metrics"]]

    floors = _floors(runs)
    levels = [Level(label=name, value=floors[name]) for name in ("blind", "majority") if name in floors]
    if len(runs) == 1:
        both = [("anls", "ANLS", "second"), ("accuracy", "accuracy", "main")]
        series = [Series(label=name, points=points(runs[0], key), style=style) for key, name, style in both]
        return [chart("Metrics during training", series, form=percent, levels=levels)]

    def together(key: str, name: str, levels: Sequence[Level] = ()) -> Chart | None:
        series = [Series(label=run.short, points=points(run, key), style=run.style) for run in runs]
        return chart(f"{name} during training", series, form=percent, levels=levels)

    # Where answers are a word, ANLS says what the accuracy says.
    gaps = [
        abs(line["metrics"].get("anls", 0) - line["metrics"].get("accuracy", 0)) for run in runs for line in run.evals
    ]
    free_text = max(gaps, default=0) > 0.05
    return [together("accuracy", "Accuracy", levels), *([together("anls", "ANLS")] if free_text else [])]


def _histograms(runs: Sequence[Told]) -> list[Bars]:
    """Of the training examples, and of the answers; the same of several runs is shown once."""
    shown: dict[tuple[str, str], tuple[Statistics, list[str]]] = {}
    for run in runs:
        written = [line.get("num_tokens") or 0 for line in run.predictions]
        every = {f"training examples: {name}": one for name, one in run.lengths.items()}
        if any(written):
            every["answers of the model: tokens"] = Statistics.of(written)
        for name, one in every.items():
            shown.setdefault((name, str(one)), (one, []))[1].append(run.short)
    histograms = []
    for (name, _), (one, names) in shown.items():
        kind, _, what = name.partition(": ")
        of = "" if len(names) == len(runs) else f" \N{MIDDLE DOT} {', '.join(names)}"
        note = f"mean {number(one.mean)}, median {one.p50:,}, 95 % up to {one.p95:,}, longest {one.max:,}"
        noun = "answers" if kind.startswith("answers") else "examples"
        histograms.append(bars(f"{what.capitalize()} of {kind}{of}", one.histogram, noun=noun, note=note))
    return histograms


# ---- settings ------------------------------------------------------------------------------------------------------


def _differing(runs: Sequence[Told]) -> list[tuple[str, list[str]]]:
    """(setting, its value in every run) of what is not the same in all, but for where it is written."""
    everything = [
        {**dict(_flat(run.config)), **{f"environment.{key}": value for key, value in _flat(run.environment)}}
        for run in runs
    ]
    names = dict.fromkeys(name for one in everything for name in one if not name.endswith("keeping.out"))
    table = [(name, [one.get(name, "\N{EN DASH}") for one in everything]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def _sections(tree: Mapping[str, Any], top: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """A nested dict as (section, rows (key, value)): one section per nested dict, the plain values under `top`."""
    plain = [(key, _text(value)) for key, value in tree.items() if not isinstance(value, dict)]
    nested = [(key, list(_flat(value))) for key, value in tree.items() if isinstance(value, dict)]
    return [(name, rows) for name, rows in [(top, plain), *nested] if rows]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) if value else "\N{EN DASH}"
    return str(value)

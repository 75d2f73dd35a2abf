"""What a run folder holds, read and validated once, for the report and the model card.

What a run has not written yet is empty. A damaged file is an InputError that names file, line and field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import convert
from phi3v.base.runfolder import RunFolder
from phi3v.data.check import Statistics
from phi3v.infer.metrics import Prediction

Scores = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A line of log.jsonl about an optimizer step. None is what was not measured, or was not finite."""

    step: int
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    examples: int | None = None
    examples_per_s: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    data_wait: float | None = None
    """Share of `seconds`."""
    memory_gb: float | None = None
    skipped: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A line of log.jsonl about an evaluation."""

    step: int
    metrics: dict[str, float | None]
    """None is what was not finite."""
    set: str = ""
    """The name of the file, for all but the first of `--eval`."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """The score published for the recipe and mode of a run, as a share of 1."""

    model: str
    metric: str
    mode: str
    dtype: str
    score: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a run folder, or the folder of an evaluation, holds."""

    name: str
    settings: Mapping[str, Any]
    """config.json as it was written."""
    environment: Mapping[str, Any]
    before: Scores
    final: Scores
    baselines: Scores
    steps: Sequence[Step]
    evaluations: Mapping[str, Sequence[Evaluation]]
    """By evaluation set, the first as ""."""
    sets: Mapping[str, Scores]
    """Final scores of the other evaluation sets."""
    final_step: int
    """The step after which the model was the one that is kept; 0 if that is not known."""
    skipped: int
    """Examples that could not be read."""
    predictions: Sequence[Prediction]
    lengths: Mapping[str, Statistics]
    published: Published | None
    warnings: Sequence[str]
    """What was odd in the data."""

    @classmethod
    def read(cls, path: Path, name: str = "") -> Results:
        """Raises InputError for a folder that is missing, is no run's, or holds damaged files."""
        run = RunFolder(path)
        settings, metrics, log, predictions = run.settings, run.metrics, run.log, run.predictions
        if not (settings or metrics or log or predictions):
            raise InputError(f"{path}: not a run folder (no config.json, log.jsonl, metrics.json or predictions.jsonl)")
        if "questions" in metrics:  # of `phi3v evaluate`, which writes the scores and the tables of labels
            metrics = {"final": {name: value for name, value in metrics.items() if name != "labels"}}
        scores = {
            name: convert(metrics.get(name) or {}, dict[str, int | float], f"{path / 'metrics.json'}: {name}")
            for name in ("before", "final", "baselines")
        }
        kind = dict[str, dict[str, dict[str, int | float] | None]]
        sets = convert(metrics.get("sets") or {}, kind, f"{path / 'metrics.json'}: sets")
        lines = [(f"{run.log_file}:{number}", line.get("kind"), line) for number, line in enumerate(log, start=1)]
        evaluations = [convert(line, Evaluation, place) for place, kind, line in lines if kind == "eval"]
        return cls(
            name=name or path.resolve().name,
            settings=settings,
            environment=run.environment,
            **scores,
            steps=_by_step(convert(line, Step, place) for place, kind, line in lines if kind == "step"),
            evaluations={
                name: _by_step(one for one in evaluations if one.set == name)
                for name in dict.fromkeys(["", *(one.set for one in evaluations)])
            },
            sets={name: one.get("final") or {} for name, one in sets.items()},
            final_step=convert(metrics.get("step", 0), int, f"{path / 'metrics.json'}: step"),
            skipped=sum(kind == "skip" for _, kind, _ in lines),
            predictions=[
                _prediction(line, f"{run.predictions_file}:{number}")
                for number, line in enumerate(predictions, start=1)
            ],
            lengths={
                key: convert(one, Statistics, f"{path / 'lengths.json'}: {key}") for key, one in run.lengths.items()
            },
            warnings=run.warnings,
            published=convert(run.published, Published, str(path / "published.json")) if run.published else None,
        )


def _by_step(lines: Iterable[Any]) -> list[Any]:
    """In the order of steps. The last line about a step counts: a resumed run, the final evaluation."""
    latest = {line.step: line for line in lines}
    return [latest[step] for step in sorted(latest)]


def _prediction(line: Mapping[str, Any], place: str) -> Prediction:
    """A line of predictions.jsonl; earlier versions wrote fewer fields."""
    since = {"source": "", "where": "", "anls": float(line.get("correct") is True), "num_tokens": 0}
    prediction = convert({**since, **line}, Prediction, place)
    if not prediction["answers"]:
        raise InputError(f"{place}: answers is empty")
    return prediction

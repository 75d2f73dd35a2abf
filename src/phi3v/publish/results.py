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
    metrics: dict[str, float]


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
    evaluations: Sequence[Evaluation]
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
        lines = [(f"{run.log_file}:{number}", line.get("kind"), line) for number, line in enumerate(log, start=1)]
        return cls(
            name=name or path.resolve().name,
            settings=settings,
            environment=run.environment,
            **scores,
            steps=_by_step(convert(line, Step, place) for place, kind, line in lines if kind == "step"),
            evaluations=_by_step(convert(line, Evaluation, place) for place, kind, line in lines if kind == "eval"),
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

"""Evaluations before, during and after training, and their summary at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal, cast

from rich.markup import escape

from phi3v.base.console import say
from phi3v.infer.answering import evenly, predict
from phi3v.infer.metrics import Prediction, baselines, label_tables, score
from phi3v.train.setup import Job

Split = Literal["before", "during", "final"]


def evaluate(job: Job, split: Split, step: int, model: Any = None) -> dict[str, float]:
    """Answers the questions of `--eval`, all of them only at the end, and logs their scores, which it returns.

    `model` is by default the engine's, as it is now. Raises Stopped, on all ranks, when a stop is requested.
    """
    if model is None:
        with job.engine.whole() as model:
            return evaluate(job, split, step, model)
    run, data, started = job.run, job.data, time.monotonic()
    when = {"before": "before training", "during": f"after step {step}", "final": "after training"}[split]
    predictions = predict(
        model,
        job.processor,
        evenly(data.questions, None if split == "final" else run.evaluation.eval_limit),
        data.scoring,
        limits=data.settings.limits,
        reading=data.reading,
        max_new_tokens=run.evaluation.max_new_tokens,
        dtype=job.choices.dtype,
        title=f"evaluating {when}",
        progress=run.keeping.progress,
        ranks=job.ranks,
        leave_off=lambda: job.stop.reason is not None,
    )
    if split != "during":
        job.ranks.first_does(lambda: job.folder.save_predictions(predictions, before=split == "before"))
    metrics, seconds = score(predictions), time.monotonic() - started
    say(f"{when}: accuracy {metrics['accuracy']:.1%} on {metrics['questions']:,} questions in {seconds:.0f} s")
    entry = {"kind": "eval", "step": step, "epoch": round(step / data.steps_per_epoch, 4), "split": split}
    job.log.write({**entry, "metrics": metrics, "seconds": round(seconds, 3)})
    return metrics


def final_metrics(job: Job, model: Any) -> dict[str, Any]:
    """Evaluates the trained model on all questions; returns the content of metrics.json."""
    data, folder = job.data, job.folder
    if not data.questions:
        return {"before": None, "final": None, "baselines": None}
    final = evaluate(job, "final", data.total_steps, model)

    def with_others() -> dict[str, Any]:
        before = next((entry["metrics"] for entry in folder.log if entry.get("split") == "before"), None)
        result = {"before": before, "final": final, "baselines": baselines(data.examples, data.questions)}
        if data.scoring.labels:
            result["labels"] = label_tables(cast(list[Prediction], folder.predictions), data.scoring.labels)
        return result

    return job.ranks.first_does(with_others)


def announce(result: dict[str, Any], report: Path) -> None:
    """Prints the scores of a finished run and where its model and its report are."""
    if result["final"] is not None:
        before, final, floor = result["before"], result["final"], result["baselines"]
        say(f"\n[bold]accuracy on {final['questions']:,} test questions[/]")
        if before is not None:
            subset = f"   (of {before['questions']:,} of them)" if before["questions"] < final["questions"] else ""
            say(f"  before training                   {before['accuracy']:7.1%}{subset}")
        say(f"  trained model                     [bold]{final['accuracy']:7.1%}[/]")
        say(f"  best answer per question text     {floor['blind']:7.1%}   (never looks at the image)")
        say(f"  most frequent answer              {floor['majority']:7.1%}")
    say(f"\nmodel   {escape(str(report.parent / 'final'))}\nreport  {escape(str(report))}")

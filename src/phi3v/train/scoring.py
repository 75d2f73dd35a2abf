"""Evaluations before, during and after training, and their summary at the end."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, Literal, cast

from rich.markup import escape

from phi3v.base.console import say
from phi3v.infer.answering import evenly, predict
from phi3v.infer.metrics import Prediction, baselines, label_tables, score
from phi3v.infer.objective import objective
from phi3v.train.setup import Job

Split = Literal["before", "during", "final"]


def evaluate(job: Job, split: Split, step: int, model: Any = None) -> dict[str, dict[str, float]]:
    """Answers the questions of every file of `--eval`, all of them only at the end; logs and returns the scores.

    `model` is by default the engine's, as it is now. Raises Stopped, on all ranks, when a stop is requested; nothing is
    logged then.
    """
    if model is None:
        with job.engine.whole() as model:
            return evaluate(job, split, step, model)
    run, data = job.run, job.data
    when = {"before": "before training", "during": f"after step {step}", "final": "after training"}[split]
    limit = None if split == "final" else run.evaluation.eval_limit
    how: dict[str, Any] = {"reading": data.reading, "dtype": job.choices.dtype, "ranks": job.ranks}
    how |= {"progress": run.keeping.progress, "leave_off": lambda: job.stop.reason is not None}
    entries, found = [], dict[str, dict[str, float]]()
    for number, one in enumerate(data.eval_sets):
        started, of_set = time.monotonic(), f", {escape(one.name)}" if number else ""
        loss = objective(model, one.encoded, one.schedule(limit), title=f"validation loss {when}{of_set}", **how)
        predictions = predict(
            model,
            job.processor,
            evenly(one.questions, limit),
            data.scoring,
            limits=data.settings.limits,
            max_new_tokens=run.evaluation.max_new_tokens,
            title=f"evaluating {when}{of_set}",
            **how,
        )
        if split != "during":
            save = functools.partial(job.folder.save_predictions, predictions, of_set=one.name if number else "")
            job.ranks.first_does(functools.partial(save, before=split == "before"))
        found[one.name] = metrics = {"loss": loss, **score(predictions, one.metrics, job.own_metrics)}
        seconds = time.monotonic() - started
        scores = f"accuracy {metrics['accuracy']:.1%}, validation loss {loss:.4g}"
        say(f"{when}{of_set}: {scores} on {metrics['questions']:,} questions in {seconds:.0f} s")
        entry = {"kind": "eval", "step": step, "epoch": round(step / data.steps_per_epoch, 4), "split": split}
        entry |= {"metrics": metrics, "seconds": round(seconds, 3)}
        entries.append({**entry, "set": one.name} if number else entry)
    for entry in entries:
        job.log.write(entry)
    return found


def final_metrics(job: Job, model: Any, step: int) -> dict[str, Any]:
    """Evaluates the trained model, as it was after `step`, on all questions; returns the content of metrics.json."""
    data, folder = job.data, job.folder
    if not data.eval_sets:
        return {"step": step, "before": None, "final": None, "baselines": None}
    scores = evaluate(job, "final", step, model)

    def with_others() -> dict[str, Any]:
        before = {entry.get("set", ""): entry["metrics"] for entry in folder.log if entry.get("split") == "before"}
        sets = {}
        for number, one in enumerate(data.eval_sets):
            floors = baselines(data.examples, one.questions)
            earlier = before.get(one.name if number else "")
            sets[one.name] = {"before": earlier, "final": scores[one.name], "baselines": floors}
        first, *others = sets
        result = {"step": step, **sets[first], "sets": {name: sets[name] for name in others}}
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
        if (loss := final.get("loss")) is not None:
            say(f"  validation loss                   {loss:7.3f}")
    for name, one in result.get("sets", {}).items():
        say(f"  trained model on {escape(name):<17}{one['final']['accuracy']:7.1%}")
    step = f"   (as it was after step {result['step']:,})" if "step" in result else ""
    say(f"\nmodel   {escape(str(report.parent / 'final'))}{step}\nreport  {escape(str(report))}")

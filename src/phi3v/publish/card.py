"""The model card of an exported run: README.md with the metadata of the Hugging Face Hub.

It says what the run folder knows, and nothing that is not there. Names of files, never their paths; texts of the data
and the model are shown as they are, so that nothing in them is obeyed as Markdown or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.base.files import write_text
from phi3v.base.jsonfile import read_object
from phi3v.base.runfolder import RunFolder
from phi3v.infer.metrics import Prediction
from phi3v.publish.chart import number, percent
from phi3v.publish.report import BASELINE_NOTES, METRIC_NOTES

NUM_SAMPLES = 6
MAX_TEXT = 300
"""Characters of a question or an answer."""

SETTINGS = {
    "data": ("batch_size", "questions", "weighting"),
    "tuning": ("freeze", "lora_rank", "lora_alpha", "lora_dropout", "dora", "rslora", "quantize", "double_quant"),
    "optim": (
        *("optimizer", "epochs", "max_steps", "learning_rate", "vision_learning_rate", "projector_learning_rate"),
        *("weight_decay", "beta1", "beta2", "eps", "max_grad_norm", "schedule", "warmup_steps"),
    ),
    "keeping": ("seed",),
}
"""Of a run, what decides the weights; `None` and empty ones are left out, those of adapters without adapters, too."""


class Story(NamedTuple):
    """What a run folder tells."""

    run: Run
    environment: Mapping[str, Any]
    metrics: Mapping[str, Any]
    last_step: Mapping[str, Any]
    predictions: Sequence[Prediction]


def write_card(
    folder: Path,
    name: str,
    run_folder: Path,
    *,
    base_model: str | None,
    datasets: Sequence[str],
    difference: float,
) -> None:
    """Writes README.md into the exported `folder`. Without the files of a run in `run_folder` it tells less.

    `difference` is that of the logits, as the self-test has measured it. Raises InputError for files no run writes.
    """
    try:
        story = read_story(run_folder)
        metadata = _metadata(name, story, base_model, datasets)
        text = _template().render(
            metadata=metadata.to_yaml(),
            name=name,
            base_model=base_model,
            story=story,
            method=_method(story.run) if story else None,
            settings=_settings(story.run) if story else [],
            scores=_scores(story) if story else [],
            blind=_blind(story) if story else "",
            samples=_samples(story.predictions) if story else [],
            num_crops=read_object(folder / "preprocessor_config.json")["num_crops"],
            original_max=read_object(folder / "config.json").get("original_max_position_embeddings", 4096),
            difference=difference,
        )
    except InputError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError, jinja2.TemplateError) as error:
        reason = f"{type(error).__name__}: {error}"  # keys that are missing, texts that should be numbers
        raise InputError(f"{run_folder}: its files do not hold what a run writes ({reason})") from error
    write_text(folder / "README.md", text.encode("utf-8", "replace").decode("utf-8"))


def read_story(folder: Path) -> Story | None:
    """What a run folder tells; None if it is no run's."""
    run = RunFolder(folder)
    if not run.final.is_dir() or not run.is_run:
        return None
    steps = [entry for entry in run.log if entry.get("kind") == "step"]
    return Story(
        run=run.config,
        environment=run.environment,
        metrics=run.metrics,
        last_step=steps[-1] if steps else {},
        predictions=run.predictions,  # type: ignore[arg-type]
    )


def _metadata(name: str, story: Story | None, base_model: str | None, datasets: Sequence[str]) -> ModelCardData:
    final = (story.metrics.get("final") if story else None) or {}
    keys = [key for key in METRIC_NOTES if key in final]
    data = story.run.data.eval.name if story and story.run.data.eval else ""
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=datasets[0] if datasets else data,
            dataset_name=data,
            metric_type=key,
            metric_name=METRIC_NOTES[key][0],
            metric_value=round(final[key], 4),
        )
        for key in keys
    ]
    adapters = ["lora"] if story and story.run.tuning.adapters else []
    return ModelCardData(
        base_model=base_model,
        license="mit",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["phi3_v", "vision", "fine-tuned", "phi3v", *adapters],
        datasets=list(datasets) or None,
        metrics=keys or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _method(run: Run) -> str:
    tuning = run.tuning
    if tuning.qlora:
        how = "QLoRA: low-rank adapters over a base in four bits, here merged into the whole base"
    elif tuning.lora:
        how = "LoRA: low-rank adapters, here merged into the base"
    else:
        how = "Fine-tuning of the weights themselves"
    return how + (f"; not learning: {', '.join(tuning.frozen)}" if tuning.frozen else "")


def _settings(run: Run) -> list[tuple[str, str]]:
    """(flag, value) of what decides the weights."""
    found = []
    for group, names in SETTINGS.items():
        for name in names:
            value = getattr(getattr(run, group), name)
            idle = not run.tuning.adapters and name.startswith(("lora_", "dora", "rslora"))
            idle = idle or (name == "epochs" and run.optim.max_steps is not None)
            if value not in (None, (), False) and not idle:
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                found.append((f"--{name.replace('_', '-')}", shown))
    return found


def _scores(story: Story) -> list[tuple[str, str, str, str]]:
    """(metric, what it is, after training, before), the last a dash where it was not scored."""
    final, before = story.metrics.get("final") or {}, story.metrics.get("before") or {}
    return [
        (title, note, percent(final[key]), percent(before[key]) if key in before else "–")
        for key, (title, note) in METRIC_NOTES.items()
        if key in final
    ]


def _blind(story: Story) -> str:
    """How good one can be without the picture."""
    baselines = story.metrics.get("baselines") or {}
    known = [f"{percent(baselines[key])} ({note})" for key, note in BASELINE_NOTES.items() if key in baselines]
    return f"Accuracy of two that never look at a picture: {', '.join(known)}." if known else ""


def _samples(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Some answers at equal distances, so that right and wrong ones are there as often as they are."""
    chosen = [predictions[i * len(predictions) // NUM_SAMPLES] for i in range(NUM_SAMPLES)] if predictions else []
    distinct = {(line["where"], line["id"]): line for line in chosen}  # of fewer than NUM_SAMPLES
    return [
        {
            "pictures": ", ".join(Path(image).name for image in line["images"]) or "none",
            "question": line["user"],
            "answers": " / ".join(dict.fromkeys(line["answers"])),
            "prediction": line["prediction"],
            "right": "right" if line["correct"] else "wrong",
        }
        for line in distinct.values()
    ]


# -- Markdown --------------------------------------------------------------------------------------------------------


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # it is no HTML; `code` shows what others wrote
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "number": number}
    return environment.get_template("card.md.jinja")


def code(text: str) -> str:
    """A text as a code span of a table, which shows every character of it on one line."""
    line = " ".join(text.split())
    line = line if len(line) <= MAX_TEXT else f"{line[:MAX_TEXT]} ..."
    if not line:
        return "(nothing)"
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", "\\|")  # the one character that a table reads in code

"""The model card of an exported run: README.md with the metadata of the Hugging Face Hub.

It holds what the run folder knows and nothing else: names of files but no paths, and texts of the data and the model as
code, so that nothing in them is read as Markdown or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from phi3v.base.config import Run
from phi3v.base.files import write_text
from phi3v.base.jsonfile import read_object
from phi3v.base.runfolder import RunFolder
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.answering import evenly
from phi3v.infer.metrics import Prediction
from phi3v.publish.curves import BASELINE_NOTES, METRIC_NOTES, Contestant, metric_table
from phi3v.publish.html.page import environment
from phi3v.publish.results import Results

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
"""The settings of a run that decide the weights."""


def write_card(
    folder: Path,
    name: str,
    source: Path,
    *,
    base_model: str | None,
    datasets: Sequence[str],
    difference: float,
) -> None:
    """Write README.md into the exported `folder`. If `source` is no run folder, the card has less in it.

    `difference` is that of the logits, as the self-test has measured it. Raises InputError for damaged files.
    """
    run_folder = RunFolder(source)
    is_run = run_folder.is_run and run_folder.final.is_dir()
    run, results = (run_folder.config, Results.read(source)) if is_run else (None, None)
    processor = Phi3VProcessor.from_pretrained(folder)
    templates = environment(Path(__file__).parent, autoescape=False)  # Markdown, where `code` shows the texts of others
    templates.filters["code"] = code
    text = templates.get_template("card.md.jinja").render(
        metadata=_metadata(name, run, results, base_model, datasets).to_yaml(),
        name=name,
        base_model=base_model,
        run=run,
        results=results,
        method=_method(run) if run else "",
        settings=_settings(run) if run else [],
        scores=metric_table([Contestant("", "", results.final), Contestant("", "", results.before)]) if results else [],
        baseline_notes=BASELINE_NOTES,
        samples=_samples(results.predictions) if results else [],
        num_crops=processor.num_crops,
        rules=processor.rules,
        original_max=read_object(folder / "config.json").get("original_max_position_embeddings", 4096),
        difference=difference,
    )
    write_text(folder / "README.md", text)


def _metadata(
    name: str, run: Run | None, results: Results | None, base_model: str | None, datasets: Sequence[str]
) -> ModelCardData:
    final = results.final if results else {}
    data = next((file.name for file in run.data.eval_files.values()), "") if run else ""
    scores = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=datasets[0] if datasets else data,
            dataset_name=data,
            metric_type=key,
            metric_name=METRIC_NOTES[key][0],
            metric_value=round(final[key], 4),
        )
        for key in METRIC_NOTES
        if key in final
    ]
    return ModelCardData(
        base_model=base_model,
        license="mit",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["phi3_v", "vision", "fine-tuned", "phi3v", *(["lora"] if run and run.tuning.adapters else [])],
        datasets=list(datasets) or None,
        metrics=[score.metric_type for score in scores] or None,
        model_name=name if scores else None,
        eval_results=scores or None,
    )


def _method(run: Run) -> str:
    tuning = run.tuning
    if tuning.qlora:
        how = "QLoRA: low-rank adapters over a base in four bits, here merged into the whole base"
    elif tuning.lora:
        how = "LoRA: low-rank adapters, here merged into the base"
    else:
        how = "Fine-tuning of the weights themselves"
    return how + (f"; frozen: {', '.join(tuning.frozen)}" if tuning.frozen else "")


def _settings(run: Run) -> list[tuple[str, str]]:
    """(flag, value) of SETTINGS, without those that are unset or have no effect in this run."""
    chosen = {name: getattr(getattr(run, group), name) for group, names in SETTINGS.items() for name in names}
    if not run.tuning.adapters:
        chosen = {name: value for name, value in chosen.items() if name == "freeze" or name not in SETTINGS["tuning"]}
    if run.optim.max_steps is not None:
        del chosen["epochs"]
    return [
        (f"--{name.replace('_', '-')}", " ".join(value) if isinstance(value, tuple) else str(value))
        for name, value in chosen.items()
        if value not in (None, (), False)
    ]


def _samples(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Some answers at equal distances, so that right and wrong ones appear as often as they are given."""
    return [
        {
            "images": ", ".join(Path(image).name for image in line["images"]) or "none",
            "question": line["user"],
            "answers": " / ".join(dict.fromkeys(line["answers"])),
            "prediction": line["prediction"],
            "right": "right" if line["correct"] else "wrong",
        }
        for line in evenly(predictions, NUM_SAMPLES)
    ]


def code(text: str) -> str:
    """A text as a code span of a table, which shows every character of it on one line."""
    line = " ".join(text.split())
    line = line if len(line) <= MAX_TEXT else f"{line[:MAX_TEXT]} ..."
    if not line:
        return "(nothing)"
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", "\\|")  # a table reads this one character even in code

"""A run folder as one HTML page that needs no network, no script and no other file.

The page shows what the folder holds; a part that is not there yet (no predictions, no evaluation, a run that is still
training) is said to be missing and never an error. Text written by the model or the data is escaped by the template,
and the page's content security policy forbids scripts and every outside address.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from phi3v.chart import HEIGHT, WIDTH, Chart, Level, Series, chart, number, percent, smooth, thin
from phi3v.data.image import load_image
from phi3v.errors import InputError
from phi3v.files import write_text
from phi3v.jsonfile import read_object
from phi3v.metrics import Prediction, normalize_answer

NUM_PICTURES = 30
NUM_WRONG = 20  # of those, if there are that many and enough right ones to fill up
MAX_CLASSES = 15
MAX_IMAGES_PER_CARD = 8
IMAGE_SIZE = 256
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


class Contestant(NamedTuple):
    name: str
    note: str
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Cell:
    count: int
    share: float
    kind: str  # "right", "wrong" or "none"
    title: str


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Rows are accepted answers, columns what the model said; the last column counts everything else it said."""

    columns: list[str]
    rows: list[tuple[str, list[Cell], float]]
    note: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """One test question. `images` are data URIs, or None for a picture that could not be read."""

    images: list[str | None]
    more_images: int
    user: str
    answers: list[str]
    prediction: str
    correct: bool
    anls: float
    id: str


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run folder and return its path.

    Raises InputError when the folder is missing, holds nothing of a run, or files that no run writes.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such run folder")
    config = _read_json(run_dir / "config.json")
    environment = _read_json(run_dir / "environment.json")
    metrics = _read_json(run_dir / "metrics.json")
    if "questions" in metrics:  # of `phi3v evaluate`, which writes the scores alone
        metrics = {"final": metrics}
    log = _read_lines(run_dir / "log.jsonl")
    predictions = _read_lines(run_dir / "predictions.jsonl")
    if not (config or metrics or log or predictions):
        raise InputError(f"{run_dir}: not a run folder (no config.json, log.jsonl, metrics.json or predictions.jsonl)")

    try:
        page = _page(run_dir.resolve().name, config, environment, metrics, log, predictions)
    except InputError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError, jinja2.TemplateError) as error:
        reason = f"{type(error).__name__}: {error}"  # keys that are missing, texts that should be numbers
        raise InputError(f"{run_dir}: its files do not hold what a run writes ({reason})") from error
    path = run_dir / "report.html"
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))  # a model's text may hold half a character
    return path


def _page(
    name: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    metrics: Mapping[str, Any],
    log: Sequence[dict[str, Any]],
    predictions: Sequence[Any],
) -> str:
    steps = _by_step(line for line in log if line.get("kind") == "step")
    evals = _by_step(line for line in log if line.get("kind") == "eval")
    contestants = _contestants(metrics)
    return _template().render(
        name=name,
        contestants=contestants,
        verdict=_verdict(metrics),
        final=metrics.get("final") or {},
        facts=_facts(steps, skipped=sum(line.get("kind") == "skip" for line in log)),
        charts=_charts(steps, evals, metrics.get("baselines") or {}),
        width=WIDTH,
        height=HEIGHT,
        metric_table=_metric_table(contestants),
        confusion=_confusion(predictions),
        cards=[_card(line) for line in _choose(predictions)],
        num_predictions=len(predictions),
        num_wrong=sum(not line["correct"] for line in predictions),
        settings=_sections(config, "run"),
        environment=_sections(environment, "environment"),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number}
    return environment.get_template("report.html.jinja")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} if there is no such file. Raises InputError if it is something else."""
    if not path.exists():
        return {}
    return read_object(path)


def _read_lines(path: Path) -> list[Any]:
    """The objects of a jsonl file; [] if it is not there. A last line that is still being written is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    objects = []
    for i, line in enumerate(lines, start=1):
        try:
            if line.strip():
                objects.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if i < len(lines):
                raise InputError(f"{path}:{i}: not JSON: {error}") from error
    return objects


def _by_step(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of steps; of a step that is there twice (a resumed run, the final evaluation) the last counts."""
    latest = {line["step"]: line for line in lines}
    return [latest[step] for step in sorted(latest)]


# ---- numbers -------------------------------------------------------------------------------------------------------


def _contestants(metrics: Mapping[str, Any]) -> list[Contestant]:
    """Who has scores to compare, this run first. Baselines are known by their accuracy alone."""
    baselines = metrics.get("baselines") or {}
    everyone = [
        Contestant("This run", "after training", metrics.get("final") or {}),
        Contestant("Before", "the model this run started from", metrics.get("before") or {}),
        *(
            Contestant(key.capitalize(), note, {"accuracy": baselines[key]})
            for key, note in BASELINE_NOTES.items()
            if key in baselines
        ),
    ]
    return [one for one in everyone if one.scores]


def _verdict(metrics: Mapping[str, Any]) -> str:
    """One sentence that says whether the model looks at the pictures."""
    final, baselines = metrics.get("final") or {}, metrics.get("baselines") or {}
    if "accuracy" not in final or "blind" not in baselines:
        return ""
    points = 100 * (final["accuracy"] - baselines["blind"])
    if points <= 0:
        return f"That is {-points:.1f} points below the best a model can do without looking at the pictures."
    return f"That is {points:.1f} points above the best a model can do without looking at the pictures."


def _facts(steps: Sequence[Mapping[str, Any]], skipped: int) -> list[tuple[str, str]]:
    """What the training was, in a few numbers; those the log does not hold are left out. `skipped` examples."""
    if not steps:
        return []

    def total(key: str) -> float:
        return sum(step.get(key) or 0 for step in steps)

    seconds = total("seconds")
    waited = sum((step.get("data_wait") or 0) * (step.get("seconds") or 0) for step in steps)
    memory = max(step.get("memory_gb") or 0 for step in steps)
    facts = [
        ("steps", number(steps[-1]["step"])),
        ("steps skipped", number(total("skipped"))),
        ("epochs", f"{steps[-1].get('epoch', 0):.3g}"),
        ("examples", number(total("examples"))),
        ("examples skipped", number(skipped)),
        ("time in training", _duration(seconds)),
        ("examples per second", number(total("examples") / seconds) if seconds else ""),
        ("tokens per second", number(total("tokens") / seconds) if seconds else ""),
        ("waiting for data", percent(waited / seconds) if seconds else ""),
        ("peak memory", f"{memory:.1f} GB" if memory else ""),
    ]
    return [(name, value) for name, value in facts if value not in ("", "0")]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _metric_table(contestants: Sequence[Contestant]) -> list[tuple[str, str, list[str]]]:
    """Rows (metric, explanation, one text per contestant, empty where it has no such score)."""
    known = dict.fromkeys(key for one in contestants for key in one.scores if key != "questions")
    keys = [*(key for key in METRIC_NOTES if key in known), *(key for key in known if key not in METRIC_NOTES)]
    return [
        (
            *METRIC_NOTES.get(key, (key, "")),
            [percent(one.scores[key]) if key in one.scores else "" for one in contestants],
        )
        for key in keys
    ]


def _charts(
    steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]
) -> list[Chart]:
    """The curves of the run, those without any value left out."""

    def of(key: str) -> list[tuple[float, float]]:
        return [(step["step"], step[key]) for step in steps if step.get(key) is not None]

    loss, size = thin(of("loss"))
    each = f"Each point is the mean of {size} steps. " if size > 1 else ""
    charts = [
        chart(
            "Loss",
            [
                Series(label="step", points=loss, style="faint"),
                Series(label="smoothed", points=smooth(loss, max(3, len(loss) // 12)), style="main"),
            ],
            note=each,
        ),
        chart("Metrics during training", _eval_series(evals), form=percent, levels=_levels(baselines)),
        chart("Learning rate", [Series(label="learning rate", points=thin(of("learning_rate"))[0])], zero=True),
        chart("Gradient norm", [Series(label="norm", points=thin(of("grad_norm"))[0])], note=each),
        chart("Examples per second", [Series(label="examples/s", points=thin(of("examples_per_s"))[0])], zero=True),
        chart("Tokens per second", [Series(label="tokens/s", points=thin(of("tokens_per_s"))[0])], zero=True),
    ]
    return [one for one in charts if one]


def _levels(baselines: Mapping[str, float]) -> list[Level]:
    return [Level(label=name, value=baselines[name]) for name in ("blind", "majority") if name in baselines]


def _eval_series(evals: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Accuracy and ANLS of the evaluations before, during and after training."""
    series = [
        Series(
            label=name,
            points=[(line["step"], line["metrics"][key]) for line in evals if key in line["metrics"]],
            style=style,
        )
        for key, name, style in (("anls", "ANLS", "second"), ("accuracy", "accuracy", "main"))
    ]
    return [one for one in series if one.points]


# ---- answers -------------------------------------------------------------------------------------------------------


def _confusion(predictions: Sequence[Prediction]) -> Confusion | None:
    """Of the most frequent answers; None where answers are free text, so that those cover less than half."""
    pairs = []
    for line in predictions:
        said = normalize_answer(line["prediction"])
        accepted = [normalize_answer(answer) for answer in line["answers"]]
        pairs.append((said if said in accepted else accepted[0], said))
    frequency = Counter(truth for truth, _ in pairs)
    classes = [answer for answer, _ in frequency.most_common(MAX_CLASSES)]
    covered = sum(frequency[answer] for answer in classes)
    if covered < len(pairs) / 2 or not pairs:
        return None
    counts = Counter((truth, said if said in classes else None) for truth, said in pairs)

    def cell(truth: str, said: str | None) -> Cell:
        count = counts[truth, said]
        share = count / frequency[truth]
        kind = "none" if not count else "right" if truth == said else "wrong"
        title = (
            f"answer: {truth}\nmodel: {said or 'something else'}\n{count:,} of {frequency[truth]:,} ({percent(share)})"
        )
        return Cell(count=count, share=share, kind=kind, title=title)

    columns: list[str | None] = [*classes]
    if any(said is None for truth, said in counts if truth in classes):
        columns.append(None)
    rows = [
        (truth, [cell(truth, said) for said in columns], counts[truth, truth] / frequency[truth]) for truth in classes
    ]
    note = ""
    if len(frequency) > len(classes):
        share = percent(covered / len(pairs))
        note = f"These are the {len(classes)} most frequent of {len(frequency):,} answers, {share} of the questions."
    return Confusion(columns=[name or "other" for name in columns], rows=rows, note=note)


def _choose(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The questions to show: up to NUM_WRONG wrong ones, then right ones; different pictures before the same again.

    The choice is random but always the same for the same predictions.
    """
    mixed = random.Random(0).sample(list(predictions), len(predictions))
    seen: set[tuple[str, ...]] = set()
    fresh: list[Prediction] = []  # the first question on its picture
    again: list[Prediction] = []
    for line in sorted(mixed, key=lambda line: bool(line["correct"])):
        images = tuple(line["images"])
        (again if images in seen else fresh).append(line)
        seen.add(images)
    ordered = [*fresh, *again]
    wrong = [line for line in ordered if not line["correct"]]
    right = [line for line in ordered if line["correct"]]
    num_wrong = min(len(wrong), max(NUM_WRONG, NUM_PICTURES - len(right)))
    return [*wrong[:num_wrong], *right][:NUM_PICTURES]


def _card(line: Prediction) -> Card:
    return Card(
        images=[_picture(path) for path in line["images"][:MAX_IMAGES_PER_CARD]],
        more_images=max(0, len(line["images"]) - MAX_IMAGES_PER_CARD),
        user=re.sub(r"<\|image_\d+\|>\s*", "", line["user"]),
        answers=list(dict.fromkeys(line["answers"])),
        prediction=line["prediction"].strip(),
        correct=bool(line["correct"]),
        anls=line.get("anls", 0.0),
        id=line["id"],
    )


def _picture(path: str) -> str | None:
    """The image as a data URI, made to fit IMAGE_SIZE; None if it cannot be read."""
    try:
        image = load_image(path)
    except InputError:
        return None
    small = max(image.size) <= IMAGE_SIZE
    image.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", optimize=True)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- settings ------------------------------------------------------------------------------------------------------


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
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) if value else "–"
    return str(value)

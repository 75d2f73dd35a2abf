"""`phi3v evaluate`: the questions of a data file, answered and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from tyro.conf import arg

from phi3v.base.config import Metric, check_flags
from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.files import file_digest, make_folder
from phi3v.base.jsonfile import Count
from phi3v.base.ranks import join
from phi3v.base.runfolder import RunFolder
from phi3v.data.schema import read_jsonl
from phi3v.infer.answering import Answerer, Loading, Packing, ScoredBy, Scoring, read_questions
from phi3v.infer.metrics import label_tables, pick_metrics
from phi3v.infer.metrics import score as scores_of


def evaluate(
    model: str,
    /,
    *,
    data: Path,
    image_root: Path | None = None,
    out: Path | None = None,
    limit: Count | None = None,
    metrics: tuple[Metric, ...] = (),
    max_new_tokens: Count = 64,
    score: ScoredBy = "generate",
    labels: tuple[str, ...] = (),
    loading: Annotated[Loading, arg(name="")] = Loading(),
    packing: Annotated[Packing, arg(name="")] = Packing(),
    progress: bool = True,
) -> dict[str, float]:
    """Answer every question of DATA and score the answers.

    Writes predictions.jsonl and metrics.json, and prints the scores.

    Args:
        model: A run folder (its final model), or a model or adapter folder, or a name on the Hub.
        data: Conversations, one JSON object a line.
        image_root: Folder the image paths are relative to. Default: the folder `images` beside the data file.
        out: Where the results go. Default: `evaluation/<name of the data>` inside the run or model folder, with eight
            digits of the data's SHA-256 at the end if another file of that name is there already.
        limit: Answer only this many questions, evenly spread.
        metrics: Scores beside the accuracy. Default: those that suit the length of the answers.
        max_new_tokens: Longest answer, in tokens.
        score: generate: what the model writes. labels: the most likely of a closed set. both: one beside the other.
        labels: The closed set. Default: the answers of the data, if they are few.
        progress: Show a progress bar.
    """
    check_flags(locals(), evaluate)
    ranks = join()
    place = (Path(model) if Path(model).is_dir() else Path("runs")) / "evaluation"
    results = RunFolder(out or place / data.stem)
    if results.is_run:
        raise InputError(f"--out {out} holds a run or a model: choose another folder")
    prompts = read_questions(data, image_root, limit)
    if results.answers_another(digest := file_digest(data)):
        if out is not None:
            raise InputError(f"--out {out} holds the answers to another file: choose another folder")
        results = RunFolder(place / f"{data.stem}-{digest[:8]}")
    scoring = Scoring.of(score, labels, read_jsonl(data, image_root))
    ranks.first_does(lambda: make_folder(results.path))
    answerer = Answerer.load(model, loading, packing, ranks)
    if scoring.labels:
        say(escape(f"  labels          {', '.join(scoring.labels)}"))
    predictions = answerer.answers(prompts, scoring, max_new_tokens=max_new_tokens, progress=progress)
    scores = scores_of(predictions, pick_metrics(metrics, prompts))
    tables = {"labels": label_tables(predictions, scoring.labels)} if scoring.labels else {}
    ranks.first_does(lambda: results.save_predictions(predictions))
    ranks.first_does(lambda: results.save(metrics={**scores, **tables}, environment={"data": {"eval": digest}}))
    for name, value in scores.items():
        say(f"  {name:<15} {value:,}" if name == "questions" else f"  {name:<15} {value:7.2%}")
    say(f"  predictions     {escape(str(results.predictions_file))}")
    return scores

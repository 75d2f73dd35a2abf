"""The model card: metadata the Hub can read, only what is known, and nobody's text as markup."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from phi3v.base.errors import InputError
from phi3v.publish.card import code, write_card


@pytest.fixture
def card_of(tiny_model_dir: Path, tmp_path: Path) -> Any:
    """A function that writes the card of a run, and reads it as the Hub does."""

    def write(run: Path, **facts: Any) -> ModelCard:
        folder = tmp_path / "exported"
        shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
        write_card(folder, "mine", run, **{"base_model": None, "datasets": (), "difference": 2.5e-7, **facts})
        return ModelCard.load(folder / "README.md")

    return write


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def test_the_metadata_is_what_the_hub_knows(card_of, finished_run: Path) -> None:
    card = card_of(finished_run, base_model="microsoft/Phi-3.5-vision-instruct", datasets=("owner/colors",))
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-text-to-text")
    assert data.base_model == "microsoft/Phi-3.5-vision-instruct"
    assert data.datasets == ["owner/colors"]
    assert data.metrics[0] == "accuracy"
    scores = json.loads((finished_run / "metrics.json").read_text())["final"]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {name: round(value, 4) for name, value in scores.items() if name != "questions"}
    assert {(r.dataset_type, r.dataset_name) for r in data.eval_results} == {("owner/colors", "train.jsonl")}


def test_the_text_says_how_it_was_made_and_how_good_it_is(card_of, finished_run: Path) -> None:
    text = card_of(finished_run).text
    metrics = json.loads((finished_run / "metrics.json").read_text())
    first = json.loads((finished_run / "predictions.jsonl").read_text().splitlines()[0])
    answer, right = code(first["prediction"]), "right" if first["correct"] else "wrong"
    for words in (
        "Fine-tuning of the weights themselves.",
        "| `--learning-rate` | `0.012` |",
        "| steps | 120 (30 epochs) |",
        f"| Accuracy | {100 * metrics['final']['accuracy']:.1f}\N{NO-BREAK SPACE}% |",
        f"{100 * metrics['baselines']['blind']:.1f}\N{NO-BREAK SPACE}% (best answer per question text, no image)",
        "before training (on 5 of them)",
        "The model was trained on these very questions",
        f"| `red.png` | `what is the color` | `red` | {answer} | {right} |",
        "the model's logits differ by 2.5e-07",
        "`--max-model-len 4096`",
    ):
        assert words in text
    assert "| base model | `tiny_model" in text
    assert "lora" not in text.lower()
    assert str(finished_run.parent) not in text
    assert "--epochs" not in text, "the run was measured in steps"


def test_a_lora_run_without_an_evaluation_says_so(card_of, lora_run: Path) -> None:
    card = card_of(lora_run)
    assert "lora" in card.data.tags
    assert card.data.eval_results is None
    assert card.data.metrics is None
    assert "| `--lora-rank` | `4` |" in card.text
    assert "None were measured in training." in card.text
    assert "## Samples" not in card.text


def test_a_folder_that_is_no_run_has_a_short_card(card_of, tiny_model_dir: Path) -> None:
    assert "This card was written without the files of the run." in card_of(tiny_model_dir).text


def test_texts_of_others_are_shown_as_they_are(card_of, run: Path) -> None:
    hostile = "<script>alert(1)</script> | `tick` ``` ![x](http://a.b/c.png)\n\n# heading"
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    lines[0] |= {"prediction": hostile, "user": "{{ 7 * 7 }}\n---\nlicense: other"}
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = card_of(run)
    assert card.data.license == "mit"
    (row,) = [line for line in card.text.splitlines() if "alert(1)" in line]
    assert row.replace("\\|", "").count("|") == 6, "a cell has grown out of its table"
    assert "```` <script>alert(1)</script> \\| `tick` ``` ![x](http://a.b/c.png) # heading ````" in row
    assert "`{{ 7 * 7 }} --- license: other`" in row


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "`plain`"),
        ("", "(nothing)"),
        ("a`b", "`` a`b ``"),
        ("a\nb", "`a b`"),
        ("x" * 400, f"`{'x' * 300} ...`"),
    ],
)
def test_a_text_is_a_code_span(text: str, shown: str) -> None:
    assert code(text) == shown


def test_a_damaged_file_is_named(card_of, run: Path) -> None:
    (run / "metrics.json").write_text('{"final": {"accuracy": "much"}}')
    with pytest.raises(InputError, match=r"metrics\.json: final.*: must be an integer or a number, not a string"):
        card_of(run)

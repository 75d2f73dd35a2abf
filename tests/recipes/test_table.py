"""The guide's tables, and what becomes of a run in every mode."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from phi3v.base.config import Run
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.parts import add_lora, freeze
from phi3v.recipes import RECIPES, docvqa, find_recipe, forkme, hateful_memes, load_recipe, nlvr2
from phi3v.recipes.table import MODES, show, with_mode

GOLDEN = Path(__file__).parents[1] / "golden" / "recipes"
GUIDE = [recipe for recipe in map(find_recipe, RECIPES) if hasattr(recipe, "TABLE")]

# Method, dtype, LoRA rank, alpha, batch size, learning rate, epochs, score: as the guide prints it.
PUBLISHED = {
    nlvr2: """
        full   bf16  -   -   64 1e-5 3 89.40
        frozen bf16  -   -   64 2e-5 2 89.20""",
    docvqa: """
        full   bf16  -   -   64 5e-6 2 83.65
        full   fp16  -   -   64 5e-6 2 82.60
        frozen bf16  -   -   64 1e-4 2 79.19
        frozen fp16  -   -   64 1e-4 2 78.74
        lora   bf16  32  16  64 2e-4 2 82.46
        lora   fp16  32  16  64 2e-4 2 82.34
        qlora  bf16  32  16  64 2e-4 2 81.85
        qlora  fp16  32  16  64 2e-4 2 81.85""",
    hateful_memes: """
        full   bf16  -   -   64 5e-5 2 86.4
        full   fp16  -   -   64 5e-5 2 85.4
        frozen bf16  -   -   64 1e-4 3 79.4
        frozen fp16  -   -   64 1e-4 3 78.6
        lora   bf16  128 256 64 2e-4 2 86.6
        lora   fp16  128 256 64 2e-4 2 85.2
        qlora  bf16  128 256 64 2e-4 2 84.0
        qlora  fp16  128 256 64 2e-4 2 83.8""",
}


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda recipe: recipe.__name__)
def test_published_rows_are_the_guide_s(recipe: ModuleType) -> None:
    rows = [row for row in recipe.TABLE.rows if row.score is not None]
    numbers = [
        (row.lora_rank, row.lora_alpha, row.batch_size, row.learning_rate, row.epochs, row.score) for row in rows
    ]
    printed = [line.split() for line in PUBLISHED[recipe].strip().splitlines()]
    assert [[row.mode, row.dtype] for row in rows] == [words[:2] for words in printed]
    assert numbers == [tuple(None if word == "-" else float(word) for word in words[2:]) for words in printed]


def test_whose_scores_and_which_are_suspect() -> None:
    assert (nlvr2.TABLE.model, docvqa.TABLE.model) == ("Phi-3.5-vision", "Phi-3-vision")
    for recipe in GUIDE:
        published = [row for row in recipe.TABLE.rows if row.score is not None]
        suspect = {row.mode for row in published if row.note}
        assert suspect == ({"frozen"} if recipe in (docvqa, hateful_memes) else set())
        assert not any(row.note for row in recipe.TABLE.rows if row.score is None)


@pytest.mark.parametrize("recipe", [*GUIDE, forkme], ids=lambda recipe: recipe.__name__)
def test_every_mode_has_a_row_and_precisions_do_not_differ(recipe: ModuleType) -> None:
    for mode in MODES:
        rows = [row for row in recipe.TABLE.rows if row.mode == mode]
        assert rows, mode
        fields = ("lora_rank", "lora_alpha", "batch_size", "learning_rate", "epochs")
        assert len({tuple(getattr(row, field) for field in fields) for row in rows}) == 1
        assert all((row.lora_rank is not None) == ("lora" in mode) for row in rows)


def learning(run: Run) -> list[str]:
    """The names of what learns in a model of two layers; what is not run of CLIP is its third."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(
            Phi3VConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                pad_token_id=0,
                image_token_id=1,
                vision_config={
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 2,
                },
                rope_scaling={"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            )
        )
    tuning = run.tuning
    freeze(model, tuning.frozen)
    if tuning.adapters:
        add_lora(
            model,
            frozen=tuning.frozen,
            rank=tuning.lora_rank,
            alpha=tuning.alpha,
            dropout=tuning.lora_dropout,
            init="default",
            dora=tuning.dora,
            rslora=tuning.rslora,
        )
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("recipe", GUIDE, ids=lambda recipe: recipe.__name__.rpartition(".")[2])
def test_golden_settings_and_names(recipe: ModuleType, mode: str | None, refresh_golden: bool) -> None:
    """All that decides what is learnt, in tests/golden/recipes; `pytest --refresh-golden` writes it anew."""
    run = recipe.settings(recipe.Options(mode=mode))
    settings = run.to_dict()
    found = {
        "settings": {group: settings[group] for group in ("base", "data", "tuning", "optim")},
        "learning": learning(run),
    }
    file = GOLDEN / recipe.__name__.rpartition(".")[2] / f"{mode or 'default'}.json"
    if refresh_golden:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(file.read_text())


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("recipe", [*GUIDE, forkme], ids=lambda recipe: recipe.__name__)
def test_every_mode_is_a_run_that_checks(recipe: ModuleType, mode: str | None) -> None:
    run = recipe.settings(recipe.Options(mode=mode))
    assert run.data.train == run.data.eval == ()
    replace(run, data=replace(run.data, train=Path("x.jsonl"))).check()


def test_a_mode_takes_exactly_its_row() -> None:
    run = docvqa.settings(docvqa.Options(mode="lora"))
    assert (run.tuning.lora, run.tuning.qlora, run.tuning.freeze_vision_model) == (True, False, False)
    assert (run.tuning.lora_rank, run.tuning.alpha, run.data.batch_size) == (32, 16, 64)
    assert (run.optim.learning_rate, run.optim.epochs) == (2e-4, 2)
    plain = Run()
    assert with_mode(plain, docvqa.TABLE, None) is plain
    frozen = with_mode(plain, hateful_memes.TABLE, "frozen")
    assert (frozen.tuning.freeze_vision_model, frozen.tuning.lora, frozen.optim.epochs) == (True, False, 3)
    assert with_mode(plain, nlvr2.TABLE, "qlora").tuning.qlora


def test_show_prints_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3v.recipes.table.console.width", 120)
    show("hateful-memes")
    out = capsys.readouterr().out
    assert "Hateful Memes: does a meme" in out
    assert "\nScores    accuracy; area under the ROC curve" in out
    assert "accuracy in percent, of Phi-3-vision" in out
    assert "phi3v train hateful-memes --mode MODE" in out
    line = next(line for line in out.splitlines() if "79.40*" in line)
    assert [word.strip() for word in line.strip("│ ").split("│")] == [
        "frozen",
        "bf16",
        "-",
        "-",
        "64",
        "1e-4",
        "3",
        "79.40*",
    ]
    assert "* suspect: " in out
    show("nlvr2")
    assert capsys.readouterr().out.count("our settings") == 2


def test_show_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    show()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [*RECIPES, "forkme"]


def test_show_prints_the_template_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show("forkme")
    (tmp_path / "my_task.py").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "my_task.py").NAME == "my-task"
    assert (tmp_path / "my_task.py").read_bytes() == Path(forkme.__file__).read_bytes()

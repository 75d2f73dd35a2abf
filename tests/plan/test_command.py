"""What is planned is true: the guide's advice follows from the numbers, and every command is the run of its row."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.cli import main
from phi3v.plan.devices import find_hardware
from phi3v.plan.rows import Row, plan_row
from phi3v.plan.workload import KNOWN, find_work
from phi3v.recipes import RECIPES, find_recipe
from phi3v.train import loop as training

MODES = ("full", "frozen", "lora", "qlora")


@pytest.fixture
def planned(capsys: pytest.CaptureFixture) -> Callable[..., dict[str, Any]]:
    """What `phi3v plan --json` says."""

    def run(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["plan", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Run]:
    """The run that a printed command starts."""
    started: list[Run] = []
    monkeypatch.setattr(training, "train", lambda run, **more: started.append(run))
    for name in RECIPES:
        monkeypatch.setattr(find_recipe(name), "prepare", lambda run, options: run)

    def start(command: str) -> Run:
        words = shlex.split(command)
        assert main(words[words.index("train") :]) == 0
        return started.pop()

    return start


@functools.cache
def row_for(gpu: str, num_gpus: int, recipe: str, mode: Any) -> Row:
    module = find_recipe(recipe)
    base = module.settings()
    work = find_work(module, base, recipe, None, None, None)
    return plan_row(mode, work, find_hardware(gpu, num_gpus, 1), base, module, [])


def rows_for(gpu: str, num_gpus: int = 1, recipe: str = "hateful-memes", modes: Any = MODES) -> dict[str, Row]:
    return {mode: row_for(gpu, num_gpus, recipe, mode) for mode in modes}


# -- the guide's advice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["A100-80GB", "H100", "H200"])
def test_data_centre_cards_train_the_whole_model_in_bf16_with_flash_attention(gpu: str) -> None:
    row = rows_for(gpu, 8, modes=["full"])["full"]
    assert row.fits
    assert row.summary.startswith("bf16, flash_attention_2, zero2, adamw, ")
    assert row.command.startswith("torchrun --nproc_per_node=8 -m phi3v train hateful-memes --mode full")


def test_eight_v100_train_the_whole_model_in_fp16_without_flash_attention() -> None:
    row = rows_for("V100-32GB", 8, modes=["full"])["full"]
    assert row.fits
    assert row.summary.startswith("fp16, sdpa, zero2, adamw, ")  # the card has no bf16 for adamw-bf16


@pytest.mark.parametrize("gpu", ["4090", "3090"])
def test_consumer_cards_train_adapters(gpu: str) -> None:
    rows = rows_for(gpu, 2, modes=["full", "frozen", "lora"])
    assert [rows[mode].fits for mode in rows] == [False, False, True]


@pytest.mark.parametrize("recipe", ["nlvr2", "ucf101"])
def test_a_turing_card_of_the_cloud_needs_four_bits_for_pairs_and_videos(recipe: str) -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    rows = rows_for("T4", recipe=recipe)
    assert [rows[mode].fits for mode in rows] == [False, False, False, True]
    assert rows["qlora"].summary.startswith("fp16")


def test_one_large_card_trains_the_whole_model_with_an_optimizer_that_keeps_less() -> None:
    row = rows_for("A100-80GB", modes=["full"])["full"]
    assert row.fits
    assert row.run.optim.optimizer == "adamw-bf16"
    assert "--optimizer adamw-bf16" in row.command
    assert "torchrun" not in row.command


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name in KNOWN])
def test_every_command_starts_the_run_of_its_row(recipe: str, trained: Callable[[str], Run]) -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    for mode, row in rows_for("A100-80GB", 2, recipe).items():
        assert trained(row.command) == row.run, mode


def test_the_command_for_ones_own_data_too(
    tiny_data: Path, tiny_model_dir: Path, trained: Callable[[str], Run], planned: Callable[..., dict[str, Any]]
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    said = planned("--train", tiny_data, "--eval", tiny_data, "--model", tiny_model_dir, "--gpu", "T4", "--out", "a b")
    assert [row["mode"] for row in said["rows"]] == list(MODES)
    for row in said["rows"]:
        run = trained(row["command"])
        assert (run.data.train, run.data.eval, run.keeping.out) == ((tiny_data,), (tiny_data,), Path("a b"))
        assert run.data.batch_size == 4  # of 14 examples, so that an epoch has a few steps
        assert run.data.max_tokens_per_pack == row["max_tokens_per_pack"]
        run.check()


def test_the_recommended_command_really_runs(
    tiny_data: Path, tiny_model_dir: Path, tmp_path: Path, planned: Callable[..., dict[str, Any]], capsys: Any
) -> None:
    said = planned("--train", tiny_data, "--model", tiny_model_dir, "--gpu", "T4", "--out", tmp_path / "run")
    assert said["rows"][0]["recommended"]
    words = shlex.split(said["rows"][0]["command"])
    assert words[:2] == ["phi3v", "train"]
    assert main([*words[1:], "--dry-run"]) == 0
    assert f"{said['data']['examples']} examples on {said['data']['pages']} pages" in capsys.readouterr().out


# -- the data --------------------------------------------------------------------------------------------------------


def test_ones_own_data_is_measured(tiny_data: Path, tiny_model_dir: Path, planned: Callable[..., Any]) -> None:
    data = planned("--train", tiny_data, "--model", tiny_model_dir, "--gpu", "T4", "--mode", "full")["data"]
    assert (data["examples"], data["pages"], data["num_crops"]) == (14, 5, 1)
    assert data["source"] == "every image and text measured"


def test_without_a_tokenizer_texts_are_estimated_and_images_are_not(
    tiny_data: Path, planned: Callable[..., Any]
) -> None:
    data = planned("--train", tiny_data, "--gpu", "T4", "--mode", "full", "--num-crops", "1")["data"]
    assert "4 letters a token" in data["source"]
    assert data["mean_tokens"] == pytest.approx(313, abs=40)  # the image, and a few words; one example has no image
    more = planned("--train", tiny_data, "--gpu", "T4", "--mode", "full", "--num-crops", "16")["data"]
    assert more["mean_crops"] > 10 * data["mean_crops"] / 2


# -- speed -----------------------------------------------------------------------------------------------------------


def test_twice_the_cards_are_twice_the_speed_and_half_the_time() -> None:
    one, two = (rows_for("H100", number, modes=["lora"])["lora"] for number in (1, 2))
    assert two.examples_per_s == pytest.approx(2 * one.examples_per_s)  # type: ignore[operator]
    assert two.hours_per_epoch == pytest.approx(one.hours_per_epoch / 2)  # type: ignore[operator]
    assert one.hours_per_epoch == pytest.approx(8000 / one.examples_per_s / 3600)  # type: ignore[operator]


def test_the_speed_is_the_assumed_share_of_the_peak() -> None:
    row = rows_for("H100", modes=["lora"])["lora"]
    assert row.recomputed_layers == 0
    assert row.examples_per_s == pytest.approx(0.4 * 989e12 / row.flops_per_example)


def test_questions_about_one_page_cost_little() -> None:
    module = find_recipe("docvqa")
    base = module.settings()
    work = find_work(module, base, "docvqa-full", None, None, None)
    alone = find_work(module, base, "docvqa", None, None, None)
    hardware = find_hardware("H100", 1, 1)
    shared, single = (plan_row("lora", w, hardware, base, module, []) for w in (work, alone))
    assert single.flops_per_example / shared.flops_per_example == pytest.approx(3.76, rel=0.03)


# -- the machine -----------------------------------------------------------------------------------------------------


def test_the_gpus_here_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class About:
        name, total_memory, major, minor = "NVIDIA H100 80GB HBM3", 84_900_000_000, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: About)
    hardware = find_hardware(None, None, 1)
    assert (hardware.num_gpus, hardware.card.tflops, hardware.card.memory_gb) == (4, 989, pytest.approx(84.9))
    assert (hardware.card.dtype, hardware.card.attention) == (torch.bfloat16, "flash_attention_2")
    About.name = "Graphcard 9000"
    assert find_hardware(None, 2, 1).card.tflops is None


def test_a_machine_without_gpus_needs_the_name_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"no GPU: name the cards to plan for, such as --gpu 4090 \(known are B200, "):
        find_hardware(None, None, 1)


def test_an_unknown_peak_is_no_speed() -> None:
    module = find_recipe("hateful-memes")
    base = module.settings()
    hardware = find_hardware("H100", 1, 1)
    hardware = replace(hardware, card=replace(hardware.card, tflops=None))
    row = plan_row("lora", find_work(module, base, "hateful-memes", None, None, None), hardware, base, module, [])
    assert row.fits
    assert row.examples_per_s is row.hours_per_epoch is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to plan for: name a recipe"),
        (["docvqa", "--gpu", "A100"], "choose A100-40GB, A100-80GB"),
        (["docvqb", "--gpu", "T4"], "did you mean docvqa?"),
        (["nlvr2", "--full-train", "--gpu", "T4"], "--full-train is for docvqa"),
        (["docvqa", "--gpu", "T4", "--num-gpus", "0"], "--num-gpus 0: must be at least 1"),
        (["docvqa", "--azure", "job.yml"], "--azure needs --gpu"),
        (["docvqa", "--gpu", "4090", "--azure", "job.yml"], "no machine has a 4090"),
        (["--train", "nothing.jsonl", "--gpu", "T4"], "nothing.jsonl"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_where_nothing_fits_that_is_said_and_no_file_written(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "job.sh"
    assert main(["plan", "docvqa", "--gpu", "T4", "--mode", "full", "--slurm", str(file)]) == 2
    captured = capsys.readouterr()
    assert "nothing fits" in captured.out
    assert "nothing fits these GPUs" in captured.err
    assert not file.exists()


def test_the_tables_show_memory_by_part_and_the_recommended_first(capsys: Any) -> None:
    assert main(["plan", "hateful-memes", "--gpu", "4090", "--num-gpus", "2", "--mode", "lora"]) == 0
    said = capsys.readouterr().out
    for word in ("weights", "gradients", "optimizer", "activations", "logits", "examples/s", "hours/epoch", "40%"):
        assert word in said
    assert "lora recommended" in said
    assert "nothing was measured on a GPU" in said
    row = row_for("4090", 2, "hateful-memes", "lora")
    assert re.search(rf"lora\s+yes\s+{row.memory_gb['total']:.1f}\s", said)


def test_layers_are_recomputed_where_memory_is_short(capsys: Any) -> None:
    row = row_for("T4", 1, "docvqa", "lora")
    assert row.fits
    assert 0 < row.recomputed_layers <= row.num_layers == 32 + 23
    assert row.computed_flops_per_example > row.flops_per_example
    assert main(["plan", "docvqa", "--gpu", "T4", "--mode", "lora"]) == 0
    assert f"{row.recomputed_layers} of 55 layers" in capsys.readouterr().out


def test_the_tiny_model_is_planned_for_ones_own_data_only(
    tiny_data: Path, planned: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "tiny", "--gpu", "T4"]) == 2
    assert "tiny has no data set: give your own data with --train" in capsys.readouterr().err
    assert planned("tiny", "--train", tiny_data, "--gpu", "T4")["rows"][0]["fits"]

"""What a run says before it does it, and that a dry run does nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.base.config import Run
from phi3v.base.ranks import ALONE, Ranks
from phi3v.data.processor import Phi3VProcessor
from phi3v.model.loading import load_config, load_model
from phi3v.model.parts import freeze
from phi3v.train.choices import Choices
from phi3v.train.describe import describe, list_settings
from phi3v.train.feed import read_data
from phi3v.train.loop import train

MAKE = Callable[..., Run]
SAID = Callable[[], list[str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture) -> SAID:
    """The lines on the terminal since the last call, with single spaces."""
    return lambda: [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def described(said: SAID) -> Callable[..., list[str]]:
    """What is said about a run."""

    def describe_run(run: Run, ranks: Ranks = ALONE, **choices: Any) -> list[str]:
        processor, config = Phi3VProcessor.from_pretrained(run.base.model), load_config(run.base.model)
        model, _ = load_model(run.base.model)
        freeze(model, run.tuning.frozen)
        data = read_data(run, processor, config, check_first=False, ranks=ALONE)
        said()
        describe(run, data, model, config, ranks, Choices(**choices))
        return said()

    return describe_run


# -- a dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_and_writes_nothing(settings_for: MAKE, tiny_data: Path, tmp_path: Path, said: SAID) -> None:
    run = settings_for(dry_run=True, freeze=("vision",), eval=tiny_data, epochs=2.0)
    assert train(run) == {}
    assert list(tmp_path.iterdir()) == []
    lines = said()
    for line in (
        "--learning-rate 0.003",
        "--freeze vision",
        "fp32 on cpu, attention sdpa, num_crops 1",
        "vision 0 of 24,600 parameters",
        "decoder 31,392 of 31,392 parameters",
        "data 14 examples on 5 pages",
        "evaluation 15 questions",
        "accuracy, exact_match, anls, anls_official, vqa_accuracy",
        "steps 8 (4 an epoch)",
        "first step 4 examples on 2 pages",
    ):
        assert any(line in one for one in lines), line
    assert all(len(line) <= 80 or str(tmp_path.parent) in line or "/" in line for line in lines)


# two layers of (in + out) * rank: qkv 32 -> 96, o 32 -> 32, gate_up 32 -> 96, down 48 -> 32; and the head 32 -> 432
ADAPTERS = 2 * (2 * (128 + 64 + 128 + 80) + 464)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_a_dry_run_counts_the_adapters(mode: str, settings_for: MAKE, tmp_path: Path, said: SAID) -> None:
    """And of four bits every weight, not every byte: whole or quantized, the base has as many."""
    if mode == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    assert train(settings_for(dry_run=True, lora_rank=2, freeze_vision_model=True, **{mode: True})) == {}
    assert list(tmp_path.iterdir()) == []
    lines = said()
    assert any(f"decoder {ADAPTERS:,} of {31_392 + ADAPTERS:,} parameters" in line for line in lines)
    assert any("vision 0 of" in line for line in lines)
    assert any("base in 4-bit nf4" in line for line in lines) == (mode == "qlora")


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_a_dry_run_says_what_the_run_will_say(mode: str, settings_for: MAKE, said: SAID) -> None:
    """Counted on an empty shell, the same as on the weights: parameters, packs, memory."""
    if mode == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    flags = {"max_steps": 1} | ({"lora_rank": 2, mode: True} if mode != "full" else {})
    train(settings_for(dry_run=True, **flags))
    dry = _from_the_model_on(said())
    train(settings_for(**flags))
    assert _from_the_model_on(said())[: len(dry)] == dry
    assert len(dry) > 10


def _from_the_model_on(lines: list[str]) -> list[str]:
    """Without the lines on the check of the data, which the second run need not repeat."""
    return lines[next(number for number, line in enumerate(lines) if line.startswith("model ")) :]


def test_a_dry_run_of_a_run_that_is_there_changes_nothing(settings_for: MAKE, tmp_path: Path) -> None:
    train(settings_for(max_steps=1))
    run = tmp_path / "run"
    (run / "metrics.json").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(settings_for(max_steps=1, resume="auto", dry_run=True)) == {}
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_every_flag_is_listed_and_what_was_chosen_stands_out(
    settings_for: MAKE, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("phi3v.train.describe.say", lines.append)
    run = settings_for(freeze=("vision", "projector"))
    list_settings(run)
    groups = run.to_dict()
    names = {name.replace("_", "-") for values in groups.values() for name in values}
    assert {match[1] for line in lines if (match := re.match(r"  --([a-z0-9-]+)", line))} == names
    assert [line for line in lines if "--freeze " in line] == [f"  --{'freeze':<26}[bold]vision projector[/]"]
    assert [line for line in lines if "--weight-decay" in line] == [f"  --{'weight-decay':<26}[default]0.01[/]"]


# -- what is said ----------------------------------------------------------------------------------------------------


def test_several_processes_and_what_they_share_out(described: Callable[..., list[str]], settings_for: MAKE) -> None:
    run, two_ranks = settings_for(batch_size=14), Ranks(num=2, device=torch.device("cpu"))
    alone = described(run)
    two = described(run, two_ranks, engine="zero2")
    assert not any("process" in line for line in alone)
    assert "processes 2, zero2" in two
    assert any(re.fullmatch(r"[\d,]+ tokens and \d+ crops in 1 pack for each of 2 processes", line) for line in two)
    memory = [float(line.split()[2]) for lines in (alone, two) for line in lines if line.startswith("memory about")]
    assert memory[1] < memory[0]


def test_the_optimizer_is_counted_as_it_is(described: Callable[..., list[str]], settings_for: MAKE) -> None:
    def moments(optimizer: str) -> float:
        lines = described(settings_for(optimizer=optimizer, dtype="auto"))
        return float(re.search(r"optimizer ([\d.]+)", " ".join(lines))[1])  # type: ignore[index]

    assert moments("adamw-8bit") < moments("adamw-bf16") < moments("adamw")


def test_what_deserves_a_note(described: Callable[..., list[str]], settings_for: MAKE, monkeypatch) -> None:
    assert not [line for line in described(settings_for()) if line.startswith("note")]
    lines = described(settings_for(max_tokens_per_pack=320, warmup_steps=3, max_steps=5))
    assert "note 3 of 5 steps are warm-up (--warmup-steps)" in lines
    assert any(
        re.fullmatch(r"note \d+ examples exceed a pack's limits; their pages get packs of their own", x) for x in lines
    )
    assert any(
        "3 layers recomputed (--activation-checkpointing)" in line for line in described(settings_for(), recompute=3)
    )
    assert "note fsdp2 instead" in described(settings_for(), engine_note="fsdp2 instead")
    monkeypatch.setattr("phi3v.train.describe.has_bf16", lambda device: False)
    lines = described(settings_for(optimizer="adamw-bf16", dtype="auto"))
    assert "note this hardware has no bf16 arithmetic: adamw-bf16 will be slow" in lines


def test_a_name_is_not_taken_for_markup(
    described: Callable[..., list[str]], settings_for: MAKE, tiny_model_dir: Path, tmp_path: Path
) -> None:
    link = tmp_path / "[red]mine"
    link.symlink_to(tiny_model_dir)
    run = settings_for()
    assert f"model {link}" in described(replace(run, base=replace(run.base, model=str(link))))

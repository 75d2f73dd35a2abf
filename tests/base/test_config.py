"""Flags: what is refused, by which name, and the way to config.json and back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path

import pytest

from phi3v.base.config import Base, Data, Keeping, Run, Tuning
from phi3v.base.errors import InputError
from phi3v.base.runfolder import RunFolder

MAKE = Callable[..., Run]


def test_files_have_weights_and_names() -> None:
    data = Data(
        train=(Path("a.jsonl"), Path("x/b.jsonl:0.5"), Path("c:2")), eval=(Path("d/val.jsonl"), Path("hard=e.jsonl"))
    )
    assert data.train_files == {Path("a.jsonl"): 1, Path("x/b.jsonl"): 0.5, Path("c"): 2}
    assert data.eval_files == {"val": Path("d/val.jsonl"), "hard": Path("e.jsonl")}
    assert Data(train=Path("a"), eval=None) == Data(train=(Path("a"),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train": (Path("a:2"), Path("a"))}, "--train: a is there twice"),
        ({"eval": (Path("a/val.jsonl"), Path("b/val.jsonl"))}, "--eval: val is there twice"),
        ({"train": (Path("a:0"),)}, "--train a:0: a file cannot count 0 times"),
        ({"early_stopping": 3}, "--early-stopping needs --eval-every-steps"),
        ({"best": "accuracy"}, "--best needs --eval-every-steps"),
    ],
)
def test_files_and_choices_that_cannot_be_are_refused(flags: dict, message: str, settings_for: MAKE) -> None:
    with pytest.raises(InputError, match=message):
        settings_for(**flags).check()


def test_a_run_comes_back_from_its_config_json(settings_for: MAKE, tmp_path: Path) -> None:
    flags = {"freeze": ("vision", "projector"), "track": ("tensorboard",), "labels": ("yes", "no"), "lora_alpha": 3.5}
    run = settings_for(eval=Path("a/b.jsonl"), max_minutes=0.5, resume="auto", **flags)
    (tmp_path / "config.json").write_text(json.dumps(run.to_dict()))
    assert RunFolder(tmp_path).config == run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("\xff", "not UTF-8"),
        ("[]", "must hold an object, not a list"),
        ('{"base": 3}', "[...]: must be an object, not an integer"),
        ('{"bases": {}}', "unknown group 'bases'"),
        ('{"base": {"modle": "x"}}', "base.modle: no such setting"),
        ('{"data": {"batch_size": "sixteen"}}', "data.batch_size: must be an integer, not a string"),
        ('{"data": {"batch_size": 0}}', "data.batch_size: must be at least 1"),
        ('{"tuning": {"lora": "no"}}', "tuning.lora: must be true or false, not a string"),
        ('{"tuning": {"freeze": ["eyes"]}}', "tuning.freeze[0]: must be vision, projector, embeddings, not 'eyes'"),
        ('{"optim": {"schedule": "zigzag"}}', "optim.schedule: must be linear, cosine, constant, not 'zigzag'"),
        ('{"optim": {"beta1": 1.0}}', "optim.beta1: must be less than 1"),
        ('{"keeping": {"out": 7}}', "keeping.out: "),
    ],
)
def test_a_config_json_that_no_run_writes_is_refused_by_file_and_field(
    content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError) as caught:
        _ = RunFolder(tmp_path).config
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {message}")


def test_the_settings_of_earlier_versions_are_understood(settings_for: MAKE, tmp_path: Path) -> None:
    """Renamed and removed settings, and what was done before there was a choice."""
    run = settings_for(activation_checkpointing="full", decay="matrices")
    content = run.to_dict()
    content["tuning"]["activation_memory"] = content["tuning"].pop("activation_checkpointing")
    content["tuning"] |= {"vision_cache": "none", "vision_cache_dir": None}
    content["keeping"] |= {"on_nonfinite": "stop", "on_full_disk": "stop"}
    del content["optim"]["decay"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert RunFolder(tmp_path).config == run


def test_a_folder_without_config_json_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run folder: it has no config\.json"):
        _ = RunFolder(tmp_path).config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train": None}, "--train is missing"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"max_steps": 0}, "--max-steps 0: must be at least 1"),
        ({"eval_limit": 0}, "--eval-limit 0: must be at least 1"),
        ({"num_crops": 0}, "--num-crops 0: must be at least 1"),
        ({"epochs": 0.0}, "--epochs 0.0: must be greater than 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: must be greater than 0"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm -1.0: must be greater than 0"),
        ({"num_workers": -1}, "--num-workers -1: must be at least 0"),
        ({"warmup_steps": -1}, "--warmup-steps -1: must be at least 0"),
        ({"lora": True, "lora_dropout": 1.0}, "--lora-dropout 1.0: must be less than 1"),
        ({"beta2": 1.0}, "--beta2 1.0: must be less than 1"),
        ({"lora_rank": 8}, "--lora-rank has no effect without --lora or --qlora"),
        ({"dora": True}, "--dora has no effect without --lora or --qlora"),
        ({"lora": True, "double_quant": True}, "--double-quant has no effect without --qlora"),
        ({"lora": True, "quantize": ("vision",)}, "--quantize has no effect without --qlora"),
        ({"qlora": True, "lora_init": "pissa"}, "--lora-init pissa decomposes the weights, which --qlora quantizes"),
        ({"qlora": True, "freeze": ("embeddings",)}, "--freeze embeddings has no effect with --lora"),
        ({"max_minutes": 0.0}, "--max-minutes 0.0: must be greater than 0"),
        ({"rank_timeout_minutes": 0.0}, "--rank-timeout-minutes 0.0: must be greater than 0"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints 0: must be at least 1"),
        ({"labels": ("yes", "no")}, "--labels has no effect with --score generate: choose labels or both"),
        ({"lora": True, "freeze": ("embeddings",)}, "--freeze embeddings has no effect with --lora"),
        ({"freeze": ("vision",), "vision_learning_rate": 1e-5}, "--vision-learning-rate has no effect"),
        (
            {"optimizer": "adamw-8bit", "parallel": "zero2"},
            "--optimizer adamw-8bit cannot be sharded by --parallel zero2",
        ),
        (
            {"optimizer": "adamw-bf16", "parallel": "fsdp2"},
            "--optimizer adamw-bf16 cannot be sharded by --parallel fsdp2",
        ),
        (
            {"optimizer": "adamw-bf16", "dtype": "fp16"},
            "--optimizer adamw-bf16 cannot be combined with --dtype fp16",
        ),
        (
            {"optimizer": "adamw-bf16"},
            "--optimizer adamw-bf16 cannot be combined with --dtype fp32: its weights are bf16",
        ),
        ({"eval_every_steps": 5}, "--eval-every-steps needs --eval"),
        ({"track": ("no_such_tracker",)}, "--track no_such_tracker: must be tensorboard, wandb, mlflow"),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(flags: dict, message: str, settings_for: MAKE) -> None:
    with pytest.raises(InputError) as caught:
        settings_for(**flags).check()
    assert str(caught.value).startswith(message)


def test_every_number_of_a_run_has_a_limit() -> None:
    """The limit is part of the type: a new field, or a renamed one, cannot be without."""
    for group in dataclasses.fields(Run):
        kind = typing.get_type_hints(Run)[group.name]
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            assert not {int, float} & set(options), f"{group.name}.{name}"


def test_what_can_be_is_not_refused(settings_for: MAKE) -> None:
    settings_for().check()
    settings_for(lora=True, lora_rank=8, lora_dropout=0.1, attention="flex_attention", dora=True, rslora=True).check()
    settings_for(vision_learning_rate=0.0, freeze=("embeddings",), warmup_steps=0, num_workers=0).check()
    settings_for(qlora=True, lora_rank=8, double_quant=True, quantize=("vision",), freeze_vision_model=True).check()
    settings_for(score="labels", labels=("yes", "no"), max_minutes=0.5, parallel="zero3").check()
    settings_for(optimizer="adamw-bf16", dtype="auto", parallel="ddp", qlora=True).check()
    settings_for(optimizer="adamw-8bit", dtype="fp16").check()


def test_eight_bits_need_bitsandbytes(settings_for: MAKE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^--optimizer adamw-8bit needs bitsandbytes: pip install 'phi3v\[qlora\]'$"):
        settings_for(optimizer="adamw-8bit").check()


def test_bf16_weights_are_multiplied_in_bf16_on_any_hardware(settings_for: MAKE) -> None:
    assert settings_for(optimizer="adamw-bf16", dtype="auto").precision == "bf16"
    assert settings_for(optimizer="adamw-8bit", dtype="auto").precision == "auto"


def test_the_short_flag_freezes_the_whole_image_embedder() -> None:
    assert Tuning(freeze_vision_model=True).frozen == ("vision", "projector")
    assert Tuning(freeze_vision_model=True, freeze=("embeddings", "vision")).frozen == (
        "vision",
        "projector",
        "embeddings",
    )


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert Tuning(lora_rank=8).alpha == 16
    assert Tuning(lora_rank=8, lora_alpha=4.0).alpha == 4


def test_the_defaults_are_the_original_recipe() -> None:
    optim, tuning = Run().optim, Run().tuning
    assert (optim.learning_rate, optim.weight_decay, optim.beta1, optim.beta2, optim.eps) == (
        4e-5,
        0.01,
        0.9,
        0.95,
        1e-7,
    )
    assert (optim.max_grad_norm, optim.schedule, optim.warmup_steps, optim.epochs) == (1.0, "linear", 50, 1)
    assert (tuning.lora_rank, tuning.alpha, tuning.lora_dropout, tuning.lora_init) == (64, 128, 0.0, "gaussian")
    assert (Data().batch_size, Keeping().seed, Base().model) == (16, 42, "microsoft/Phi-3.5-vision-instruct")

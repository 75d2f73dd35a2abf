"""Training from the flags to the run folder, on a checkpoint of 70,000 parameters and 14 examples, in float32."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import phi3v.packing.loss as loss_room
import phi3v.train.loop as room
from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.base.ranks import Ranks
from phi3v.data.encode import Encoded, encode, expand
from phi3v.data.image import num_image_tokens
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.model import Phi3VForCausalLM
from phi3v.model.loading import load_model
from phi3v.model.vision import ImageEmbedding
from phi3v.packing.loss import weighted_cross_entropy
from phi3v.packing.schedule import ScheduleSettings, schedule_epoch
from phi3v.packing.trees import Lengths, PackLimits
from phi3v.train import checkpoint, scoring
from phi3v.train.engines import replicated
from phi3v.train.loop import seed_step, train
from phi3v.train.runlog import RunLog

MAKE = Callable[..., Run]
LOG = Callable[..., list[dict[str, Any]]]
EPOCH = 4  # steps
PART = "rank-00000-of-00001.safetensors"
FLEETING = ("time", "seconds", "examples_per_s", "pages_per_s", "tokens_per_s", "tflops", "data_wait", "memory_gb")


def weights(run: Path) -> dict[str, torch.Tensor]:
    final = run / "final"
    return load_file(next(file for file in final.iterdir() if file.suffix == ".safetensors"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lasting(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a log without what the clock and the machine say."""
    return [{key: value for key, value in entry.items() if key not in FLEETING} for entry in entries]


# -- a whole run -----------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_everything(finished_run: Path) -> None:
    assert {file.name for file in finished_run.iterdir()} == {
        *(
            "config.json",
            "environment.json",
            "images.json",
            "lengths.json",
            "log.jsonl",
            "warnings.json",
            "checkpoints",
            "final",
            ".lock",
        ),
        *("predictions-before.jsonl", "predictions.jsonl", "metrics.json", "report.html"),
    }
    checkpoints = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    assert checkpoints == ["step-000060", "step-000120"], "the best so far, and the last"
    assert "accuracy" in (finished_run / "report.html").read_text()


def test_it_learns_its_examples_by_heart(finished_run: Path, log_of: LOG) -> None:
    losses = [entry["loss"] for entry in log_of(finished_run)]
    assert losses[0] == pytest.approx(6.05, abs=0.2)  # ln 432: it knows nothing
    assert max(losses[-EPOCH:]) < 0.5
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert metrics["before"]["accuracy"] == 0
    assert metrics["final"]["accuracy"] > 0.6
    assert metrics["final"]["questions"] == 15
    assert metrics["baselines"] == {"majority": pytest.approx(4 / 15), "blind": pytest.approx(11 / 15)}
    predictions = [json.loads(line) for line in (finished_run / "predictions.jsonl").read_text().splitlines()]
    assert sum(record["correct"] for record in predictions) / 15 == pytest.approx(metrics["final"]["accuracy"])


def test_evaluations_before_during_and_after_are_logged(finished_run: Path, log_of: LOG) -> None:
    found = [(e["split"], e["step"], e["metrics"]["questions"]) for e in log_of(finished_run, "eval")]
    assert found == [("before", 0, 5), ("during", 60, 5), ("during", 120, 5), ("final", 120, 15)]


@pytest.mark.parametrize("weighting", ["example", "token"])
@pytest.mark.parametrize("questions", ["all", "expected", "random"])
def test_the_validation_loss_is_the_objective_on_the_examples_of_eval(
    weighting: str, questions: str, settings_for: MAKE, tiny_data: Path, log_of: LOG
) -> None:
    """By the forward pass everyone knows; `random` draws in training and has its expectation here."""
    if (questions, weighting) == ("expected", "token"):
        pytest.skip("excluded by --questions expected")
    flags = {"batch_size": 2, "questions": questions, "weighting": weighting, "max_tokens_per_pack": 700}
    train(run := settings_for(max_steps=1, eval=tiny_data, eval_limit=6, warmup_steps=2, **flags))
    model, processor = load_model(run.base.model)
    encoded = [encode(example, processor) for example in read_jsonl(tiny_data)]
    page = Lengths.of(encoded).page
    for entry, numbers in zip(log_of(run.keeping.out, "eval"), ([0, 2, 4, 7, 9, 11], range(14)), strict=True):
        losses = {number: _loss(model, processor, encoded[number]) for number in numbers}
        if weighting == "token":
            counts = {number: encoded[number].num_targets for number in numbers}
            expected = sum(losses[n] * counts[n] for n in numbers) / sum(counts.values())
        elif questions == "all":
            expected = sum(losses.values()) / len(losses)
        else:
            by_page = [[losses[n] for n in numbers if page[n] == one] for one in {page[n] for n in numbers}]
            expected = sum(sum(of_page) / len(of_page) for of_page in by_page) / len(by_page)
        assert entry["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_step_has_exactly_the_batch_and_the_last_of_an_epoch_the_rest(finished_run: Path, log_of: LOG) -> None:
    entries = log_of(finished_run)
    assert [entry["step"] for entry in entries] == list(range(1, 121))
    assert [entry["examples"] for entry in entries] == [4, 4, 4, 2] * 30
    assert [entry["epoch"] for entry in entries[:5]] == [0.25, 0.5, 0.75, 1.0, 1.25]


def test_warmup_and_the_linear_schedule_are_in_the_log(finished_run: Path, log_of: LOG) -> None:
    rates = [entry["learning_rate"] for entry in log_of(finished_run)]
    assert rates[:3] == pytest.approx([0, 6e-3, 12e-3])
    assert rates[3:] == pytest.approx([12e-3 * (120 - k) / 118 for k in range(3, 120)])


def test_the_final_model_is_the_trained_one(settings_for: MAKE, tiny_data: Path, monkeypatch) -> None:
    kept = {}
    save = room.save_model

    def keep(model: Any, *arguments: Any, **named: Any) -> None:
        kept["model"] = model
        save(model, *arguments, **named)

    monkeypatch.setattr(room, "save_model", keep)
    train(run := settings_for(max_steps=3))
    final = run.keeping.out / "final"
    assert same(weights(run.keeping.out), {name: p.detach() for name, p in kept["model"].named_parameters()})
    processor = Phi3VProcessor.from_pretrained(final)
    inputs = processor(
        "<|user|>\n<|image_1|>\nwhat is the color<|end|>\n<|assistant|>\n",
        [Image.open(tiny_data.parent / "images/red.png")],
    )
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(final)
        assert type(loaded) is Phi3VForCausalLM
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, kept["model"].eval()(**inputs).logits)


def test_the_final_model_has_the_precision_of_its_base(settings_for: MAKE, changed_model, tiny_model_dir: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in load_file(tiny_model_dir / "model.safetensors").items()}
    train(run := settings_for(model=changed_model({"torch_dtype": "bfloat16"}, halves), max_steps=2, eval=None))
    assert {tensor.dtype for tensor in weights(run.keeping.out).values()} == {torch.bfloat16}
    learnt = load_file(run.keeping.out / "checkpoints/step-000002" / PART)
    assert {tensor.dtype for tensor in learnt.values()} == {torch.float32}


@pytest.mark.parametrize("base", ["bfloat16", "float32"])
def test_a_model_that_learns_in_bf16_is_saved_as_it_is(
    base: str, settings_for: MAKE, changed_model, tiny_model_dir: Path
) -> None:
    """In the precision of its base, and what is frozen in all of that."""
    dtype = getattr(torch, base)
    start = {name: tensor.to(dtype) for name, tensor in load_file(tiny_model_dir / "model.safetensors").items()}
    flags = {"optimizer": "adamw-bf16", "dtype": "auto", "max_steps": 2, "eval": None, "freeze": ("vision",)}
    train(run := settings_for(model=changed_model({"torch_dtype": base}, start), **flags))
    learnt = load_file(run.keeping.out / "checkpoints/step-000002" / PART)
    for name, tensor in weights(run.keeping.out).items():
        expected = learnt.get(f"weight/{name}", start[name].flatten())
        assert tensor.dtype == dtype
        assert torch.equal(tensor.flatten(), expected.to(dtype)), name


def test_the_logged_loss_is_the_mean_over_examples_of_their_mean(
    settings_for: MAKE, tiny_data: Path, log_of: LOG
) -> None:
    """The first step has a learning rate of zero, so the second sees the initial weights too."""
    train(run := settings_for(max_steps=2, warmup_steps=2))
    model, processor = load_model(run.base.model)
    encoded = [encode(example, processor) for example in read_jsonl(tiny_data)]
    plan = schedule_epoch(Lengths.of(encoded), _plan_settings(run), seed=run.keeping.seed, epoch=0)
    for step, entry in enumerate(log_of(run.keeping.out)):
        losses = [_loss(model, processor, encoded[index]) for index in plan.examples(step)]
        assert len(losses) == 4
        assert entry["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def _plan_settings(run: Run) -> Any:
    limits = PackLimits(max_tokens_per_pack=8192, max_crops_per_pack=64)
    return ScheduleSettings(batch_size=run.data.batch_size, limits=limits)


def _loss(model: Any, processor: Phi3VProcessor, example: Encoded) -> float:
    """Of one example, by the forward pass everyone knows."""
    counts = [num_image_tokens(*size) for size in example.image_sizes]
    ids = torch.from_numpy(expand(example.ids, processor.image_token_id, counts)).long()
    text = ids != processor.image_token_id
    loss_mask = torch.zeros_like(text)
    loss_mask[text] = torch.from_numpy(example.loss_mask[example.ids != processor.image_token_id])
    labels = ids.masked_fill(~loss_mask, -100)
    pictures = processor("<|image_1|>", [Image.open(example.images[0])]) if example.images else {}
    images = {name: pictures[name] for name in ("pixel_values", "image_sizes") if name in pictures}
    with torch.no_grad():
        return model.eval()(input_ids=ids[None], labels=labels[None], **images).loss.item()


def test_the_ranks_meet_once_a_step(settings_for: MAKE, log_of: LOG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first pack, however many it has; the loss is summed without another meeting."""
    meetings, sums, total = [], [], Ranks.total

    def summed(ranks: Ranks, *values: float, meet: bool = True) -> list[float]:
        sums.append(meet)
        return total(ranks, *values, meet=meet)

    monkeypatch.setattr(Ranks, "meet", lambda ranks: meetings.append(ranks))
    monkeypatch.setattr(Ranks, "total", summed)
    monkeypatch.setattr(room.GradientAudit, "check", lambda *unused, **more: None)  # it has meetings in the first steps
    train(run := settings_for(max_steps=4, max_tokens_per_pack=340, eval_before=False))
    assert max(entry["packs"] for entry in log_of(run.keeping.out)) > 1
    assert len(meetings) == len(sums) == 4
    assert not any(sums)


# -- which weights learn ---------------------------------------------------------------------------------------------


def test_what_no_example_reaches_is_not_touched_not_even_by_decay(
    settings_for: MAKE, tmp_path: Path, tiny_model_dir: Path
) -> None:
    text = tmp_path / "text.jsonl"
    turn = {"user": "answer briefly", "assistant": "yes"}
    text.write_text("".join(json.dumps({"id": str(k), "conversations": [turn]}) + "\n" for k in range(4)))
    train(run := settings_for(train=text, batch_size=2, max_steps=4, warmup_steps=0, weight_decay=0.5))
    before, after = load_file(tiny_model_dir / "model.safetensors"), weights(run.keeping.out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "vision_embed_tokens" not in name}


@pytest.mark.parametrize(
    ("frozen", "still", "dtype"),
    [
        (("vision",), "img_processor", "fp32"),
        (("projector",), "img_projection", "fp32"),
        (("embeddings",), "model.embed_tokens", "fp32"),
        (("vision",), "img_processor", "bf16"),
        (("embeddings",), "model.embed_tokens", "fp16"),
    ],
)
def test_what_is_frozen_stays_bitwise(
    dtype: str, frozen: tuple, still: str, settings_for: MAKE, tiny_model_dir: Path
) -> None:
    """Also where it was rounded to compute with."""
    train(run := settings_for(dtype=dtype, freeze=frozen, max_steps=3, warmup_steps=0, weight_decay=0.5))
    before, after = load_file(tiny_model_dir / "model.safetensors"), weights(run.keeping.out)
    tail = ("encoder.layers.2.", "post_layernorm")  # CLIP's last layer never runs
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    silent = {name for name in before if still in name or any(part in name for part in tail)}
    if frozen == ("projector",):
        silent |= {name for name in before if name.endswith(("glb_GN", "sub_GN"))}
    assert changed.isdisjoint(silent)
    assert before.keys() - changed - silent <= {n for n in before if n.endswith("k_proj.bias")}


def test_separate_learning_rates(settings_for: MAKE, tiny_model_dir: Path, log_of: LOG) -> None:
    flags = {"vision_learning_rate": 0.0, "projector_learning_rate": 1e-2, "weight_decay": 0.0}
    train(run := settings_for(max_steps=2, warmup_steps=0, schedule="constant", **flags))
    assert [entry["learning_rate"] for entry in log_of(run.keeping.out)] == [3e-3, 3e-3]
    before, after = load_file(tiny_model_dir / "model.safetensors"), weights(run.keeping.out)

    def moved(name: str) -> float:
        return float((after[name] - before[name]).abs().max())

    embedder = "model.vision_embed_tokens."
    assert moved(f"{embedder}img_processor.vision_model.encoder.layers.0.mlp.fc1.weight") == 0
    assert 3e-3 < moved(f"{embedder}img_projection.2.weight") <= 2.01e-2
    assert 1e-3 < moved("lm_head.weight") <= 6.01e-3


def test_a_part_that_should_learn_but_is_cut_off_is_named(settings_for: MAKE, monkeypatch) -> None:
    forward = ImageEmbedding.forward
    monkeypatch.setattr(ImageEmbedding, "forward", lambda *arguments: forward(*arguments).detach())
    with pytest.raises(InputError, match=r"gradient audit: model\.vision_embed_tokens\.\S+ and \d+ more should learn"):
        train(settings_for(max_steps=10))


def test_runs_of_different_precision_in_one_process(settings_for: MAKE, tmp_path: Path, log_of: LOG) -> None:
    losses = {}
    for name, dtype in (("first", "fp32"), ("half", "bf16"), ("again", "fp32")):
        train(settings_for(out=tmp_path / name, dtype=dtype, max_steps=2, freeze_vision_model=True))
        losses[name] = [entry["loss"] for entry in log_of(tmp_path / name)]
    assert losses["first"] == losses["again"]
    assert losses["first"] != losses["half"] == pytest.approx(losses["first"], rel=0.02)


# -- fp16 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def large_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss scale starts so high that the first steps are sure to overflow."""
    start = functools.partial(torch.amp.GradScaler, init_scale=2.0**20)
    monkeypatch.setattr(torch.amp, "GradScaler", start)


@pytest.mark.usefixtures("large_scale")
def test_a_step_that_overflows_in_fp16_changes_nothing_and_is_shown(
    settings_for: MAKE, tiny_model_dir: Path, log_of: LOG, capsys
) -> None:
    train(run := settings_for(dtype="fp16", max_steps=1, warmup_steps=0, weight_decay=0.5))
    before, after = load_file(tiny_model_dir / "model.safetensors"), weights(run.keeping.out)
    assert same(before, after)
    (entry,) = log_of(run.keeping.out)
    assert entry["skipped"] is True
    assert entry["grad_norm"] is None, "JSON has no infinity"
    assert "1 of 1 steps were skipped: they overflowed" in capsys.readouterr().out
    assert "steps skipped" in (run.keeping.out / "report.html").read_text()


@pytest.mark.usefixtures("large_scale")
def test_fp16_finds_its_scale_and_learns_like_float32(settings_for: MAKE, tmp_path: Path, log_of: LOG) -> None:
    flags: dict[str, Any] = {"schedule": "constant", "warmup_steps": 4, "learning_rate": 1e-3}
    train(run := settings_for(dtype="fp16", max_steps=20, **flags))
    entries = log_of(run.keeping.out)
    skipped = [entry.get("skipped", False) for entry in entries]
    num_skipped = sum(skipped)
    assert skipped[0]
    assert not all(skipped[-5:])
    # The schedule does not move on with a step that was skipped.
    rates = [entry["learning_rate"] for entry in entries]
    assert rates == pytest.approx([1e-3 * min(1, (k - sum(skipped[:k])) / 4) for k in range(20)])
    state = json.loads((run.keeping.out / "checkpoints/step-000020/state.json").read_text())
    assert state["scaler"]["scale"] == 2.0 ** (20 - num_skipped)
    train(settings_for(out=tmp_path / "whole", max_steps=20 - num_skipped, **flags))
    last = [min(entry["loss"] for entry in log_of(folder)[-4:]) for folder in (run.keeping.out, tmp_path / "whole")]
    assert last[0] == pytest.approx(last[1], rel=0.1)


def test_no_loss_scale_helps_a_gradient_that_is_never_finite(settings_for: MAKE, monkeypatch) -> None:
    """It would be skipped for ever: the run ends once there is nothing left to halve, after 2**16, ..., 1."""

    def steep(*arguments: Any) -> torch.Tensor:
        loss = weighted_cross_entropy(*arguments)
        return loss + (loss - loss.detach()).sqrt()  # plus 0, with a gradient of infinity

    monkeypatch.setattr(loss_room, "weighted_cross_entropy", steep)
    with pytest.raises(InputError, match=r"step 1: the gradient is not finite; its examples are (e\d+(, )?){4}$"):
        train(settings_for(max_steps=30))
    with pytest.raises(InputError, match=r"step 17: the gradient is not finite"):
        train(settings_for(max_steps=30, dtype="fp16", resume="auto", out=Path(settings_for().keeping.out, "fp16")))


# -- going on --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As by a signal."""


def train_until(run: Run, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains and is killed after a step was logged, before anything else is done in it."""
    log_step = RunLog.step

    def step(self: RunLog, entry: dict[str, Any]) -> None:
        log_step(self, entry)
        if entry["step"] == last:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", step)
        with pytest.raises(Killed):
            train(run)


@pytest.fixture
def dropping(settings_for: MAKE, changed_model) -> MAKE:
    """Settings of ten steps (two and a half epochs) with dropout, checkpoints and evaluations in between."""
    model = changed_model({"resid_pdrop": 0.2, "embd_pdrop": 0.1})

    def settings(**flags: Any) -> Run:
        return settings_for(**{"model": model, "max_steps": 10, "save_every_steps": 3, "weight_decay": 0.1, **flags})

    return settings


LORA = {"lora": True, "lora_rank": 4, "lora_dropout": 0.3}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "frozen": {"freeze_vision_model": True, "questions": "random", "batch_size": 2},
    "fp16": {"dtype": "fp16", "warmup_steps": 0, "eval": None, "eval_every_steps": None},  # slow answers, on a CPU
    "8-bit moments": {"optimizer": "adamw-8bit", "eval": None, "eval_every_steps": None},
    "all bf16": {
        "optimizer": "adamw-bf16",
        "dtype": "auto",
        "freeze": ("vision",),
        "eval": None,
        "eval_every_steps": None,
    },
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_run_that_was_killed_goes_on_bitwise(
    mode: dict, dropping: MAKE, tiny_data: Path, tmp_path: Path, log_of: LOG, monkeypatch
) -> None:
    flags = {"eval": tiny_data, "eval_every_steps": 4, "eval_limit": 3, **mode}
    whole = train(dropping(out=tmp_path / "whole", **flags))
    killed = dropping(out=tmp_path / "killed", **flags)
    train_until(killed, 5, monkeypatch)  # mid-epoch, two steps after a checkpoint
    going_on = dropping(out=tmp_path / "killed", resume="auto", **flags)
    train_until(
        going_on, 9, monkeypatch
    )  # across a border of epochs, right before a checkpoint and after an evaluation
    assert train(going_on) == whole
    for kind in ("step", "eval"):
        assert lasting(log_of(tmp_path / "killed", kind)) == lasting(log_of(tmp_path / "whole", kind))
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_run_goes_on_where_its_data_and_model_have_moved_to_and_knows_their_images(
    settings_for: MAKE, tiny_data: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    flags: dict[str, Any] = {"max_steps": 4, "save_every_steps": 1}
    whole = settings_for(out=tmp_path / "whole", **flags)
    train(whole)
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(tiny_data.parent, old / "data")
    shutil.copytree(tiny_model_dir, old / "model")
    killed = settings_for(model=old / "model", train=old / "data/train.jsonl", out=old / "run", **flags)
    train_until(killed, 3, monkeypatch)
    old.rename(new)
    monkeypatch.chdir(new)
    moved = {"model": "model", "train": Path("data/train.jsonl"), "out": Path("run"), "resume": "auto", **flags}
    before = (new / "data/images/red.png").read_bytes()
    Image.new("RGB", (48, 40), "purple").save(new / "data/images/red.png")
    with pytest.raises(InputError, match=r"--resume: 1 image changed since the run began, such as .*red\.png;"):
        train(settings_for(**moved))
    monkeypatch.setattr(room, "learn", lambda job: None)
    monkeypatch.setattr(room, "finish", lambda job, last: {})
    assert train(settings_for(**moved, on_bad_example="skip")) == {}
    assert "1 image changed since the run began" in " ".join(capsys.readouterr().out.split())
    monkeypatch.undo()
    monkeypatch.chdir(new)
    (new / "data/images/red.png").write_bytes(before)  # the bytes count, not when they were written
    assert train(settings_for(**moved)) == json.loads((whole.keeping.out / "metrics.json").read_text())
    assert same(weights(new / "run"), weights(tmp_path / "whole"))


def test_with_other_dropout_it_would_not(dropping: MAKE, tmp_path: Path, log_of: LOG, monkeypatch) -> None:
    """The test above can fail: dropout matters, and it is the seed of the step that brings it back."""
    train(dropping(out=tmp_path / "whole", max_steps=4))
    train_until(dropping(out=tmp_path / "killed", max_steps=4), 4, monkeypatch)
    monkeypatch.setattr(room, "seed_step", lambda *unused: None)
    train(dropping(out=tmp_path / "killed", max_steps=4, resume="auto"))
    assert log_of(tmp_path / "whole")[2]["loss"] == log_of(tmp_path / "killed")[2]["loss"]
    assert log_of(tmp_path / "whole")[3]["loss"] != log_of(tmp_path / "killed")[3]["loss"]


@pytest.mark.parametrize("drops", [True, False])
def test_dropout_differs_from_step_to_step(drops: bool, dropping: MAKE, settings_for: MAKE, log_of: LOG) -> None:
    """Five steps of the same examples and the same weights, as nothing is learnt."""
    flags = {"batch_size": 14, "max_steps": 5, "learning_rate": 1e-30, "save_every_steps": None}
    train(run := (dropping if drops else settings_for)(**flags))
    losses = {round(entry["loss"], 5) for entry in log_of(run.keeping.out)}
    assert len(losses) == (5 if drops else 1)


def test_the_seed_of_a_step_is_its_own() -> None:
    """Of every seed, step and rank another one, so that no two draw the same dropout."""
    drawn = set()
    for seed, step, rank in itertools.product((0, 1, 42, 43), (0, 1, 2, 1000, 1_000_002), (0, 1, 7)):
        seed_step(seed, step, rank)
        drawn.add(float(torch.rand((), dtype=torch.float64)))
        seed_step(seed, step, rank)
        assert float(torch.rand((), dtype=torch.float64)) in drawn
    assert len(drawn) == 4 * 5 * 3


def test_any_seed_will_do(settings_for: MAKE) -> None:
    train(settings_for(seed=2**40, max_steps=1, eval_before=False))


def test_a_damaged_checkpoint_is_passed_over_aloud(dropping: MAKE, tmp_path: Path, capsys, monkeypatch) -> None:
    train(dropping(out=tmp_path / "whole"))
    train_until(dropping(out=tmp_path / "killed"), 8, monkeypatch)
    checkpoints = tmp_path / "killed/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000003", "step-000006"]
    newest = checkpoints / "step-000006" / PART
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    train(dropping(out=tmp_path / "killed", resume="auto"))
    said = capsys.readouterr().out
    assert f"damaged checkpoint passed over: {newest} is damaged" in said
    assert f"resuming from {checkpoints / 'step-000003'}" in said
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    dropping: MAKE, tiny_data: Path, tmp_path: Path, log_of: LOG, capsys, monkeypatch
) -> None:
    flags = {"max_steps": 3, "eval": tiny_data}
    train(dropping(out=tmp_path / "whole", **flags))
    train_until(dropping(out=tmp_path / "killed", **flags), 2, monkeypatch)
    train(dropping(out=tmp_path / "killed", resume="auto", **flags))
    assert "no whole checkpoint" in capsys.readouterr().out
    assert [e["split"] for e in log_of(tmp_path / "killed", "eval")] == ["before", "final"]
    assert [e["loss"] for e in log_of(tmp_path / "killed")] == [e["loss"] for e in log_of(tmp_path / "whole")]


def test_a_run_killed_at_its_very_end_is_only_finished(
    dropping: MAKE, tiny_data: Path, tmp_path: Path, log_of: LOG, monkeypatch
) -> None:
    run = dropping(max_steps=3, eval=tiny_data)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "baselines", lambda *unused: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(run)
    assert not (run.keeping.out / "metrics.json").exists()
    before = weights(run.keeping.out)
    train(dropping(max_steps=3, eval=tiny_data, resume="auto"))
    assert same(weights(run.keeping.out), before)
    assert [e["split"] for e in log_of(run.keeping.out, "eval")] == ["before", "final"]
    assert len(log_of(run.keeping.out)) == 3


def test_what_surrounds_the_loop_may_change(settings_for: MAKE, monkeypatch) -> None:
    train_until(settings_for(max_steps=3, save_every_steps=1, keep_checkpoints=1), 3, monkeypatch)
    run = settings_for(max_steps=3, save_every_steps=2, keep_checkpoints=3, resume="auto")
    train(run)
    assert sorted(path.name for path in (run.keeping.out / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_a_run_of_an_earlier_version_resumes_with_its_own_decay(settings_for: MAKE, monkeypatch) -> None:
    """Before there was `--decay`, matrices decayed."""
    flags = {"max_steps": 2, "save_every_steps": 1}
    train_until(settings_for(**flags, decay="matrices"), 2, monkeypatch)
    file = settings_for().keeping.out / "config.json"
    settings = json.loads(file.read_text())
    del settings["optim"]["decay"]
    file.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"--resume: --decay was matrices in .*, now it is original"):
        train(settings_for(**flags, resume="auto"))
    train(settings_for(**flags, resume="auto", decay="matrices"))


# -- what goes wrong -------------------------------------------------------------------------------------------------


def disturb(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """`change(k, loss)` is the loss of the k-th pack that is learnt from, the first being 1."""
    count = itertools.count(1)
    monkeypatch.setattr(
        loss_room, "weighted_cross_entropy", lambda *given: change(next(count), weighted_cross_entropy(*given))
    )


def nan_at(*packs: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    return lambda number, loss: loss * float("nan") if number in packs else loss


def examples_of(run: Run, step: int, data: Path | None = None) -> set[str]:
    """Ids of the examples of a step of the first epoch, the first being 1; `data` is where the pictures still are."""
    processor = Phi3VProcessor.from_pretrained(run.base.model)
    encoded = [encode(example, processor) for example in read_jsonl(data or run.data.train[0])]
    plan = schedule_epoch(Lengths.of(encoded), _plan_settings(run), seed=run.keeping.seed, epoch=0)
    return {encoded[index].id for index in plan.examples(step - 1)}


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_not_finite_names_the_examples_of_the_step(
    loss: str, settings_for: MAKE, changed_model, tiny_model_dir: Path
) -> None:
    head = load_file(tiny_model_dir / "model.safetensors")["lm_head.weight"]
    head[5] = float(loss)
    run = settings_for(model=changed_model(tensors={"lm_head.weight": head}))
    with pytest.raises(InputError, match=r"step 1: the loss is not finite; its examples are (e\d+(, )?){4}$") as caught:
        train(run)
    assert set(str(caught.value).split(" are ")[1].split(", ")) == examples_of(run, 1)


def test_a_loss_that_leaps_is_complained_of(settings_for: MAKE, log_of: LOG, monkeypatch) -> None:
    monkeypatch.setattr(room, "SPIKE_WINDOW", 3)
    disturb(monkeypatch, lambda number, loss: loss * 4 if number in (2, 4) else loss)
    train(run := settings_for(max_steps=7, learning_rate=1e-6))
    (complaint,) = log_of(run.keeping.out, "complaint")  # after two steps nothing is usual yet
    losses = [entry["loss"] for entry in log_of(run.keeping.out)]
    assert complaint["step"] == 4
    assert complaint["what"] == (f"the loss is {losses[3]:.3g}, it was {sorted(losses[:3])[1]:.3g} (median of 3 steps)")
    assert set(complaint["examples"]) == examples_of(run, 4)


@pytest.fixture
def breaking(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A copy of the data of which some pictures become unreadable after the first step."""
    shutil.copytree(tiny_data.parent, tmp_path / "data")

    def prepare(*pictures: str) -> Path:
        log_step = RunLog.step

        def step(log: RunLog, entry: dict[str, Any]) -> None:
            log_step(log, entry)
            for name in pictures:
                (tmp_path / "data/images" / name).write_bytes(b"gone")

        monkeypatch.setattr(RunLog, "step", step)
        return tmp_path / "data" / tiny_data.name

    return prepare


@pytest.mark.parametrize("tokens", [8192, 340], ids=["one pack", "several packs"])
def test_an_example_that_has_become_unreadable_is_left_out(
    tokens: int, settings_for: MAKE, breaking, tiny_data: Path, log_of: LOG
) -> None:
    """The loss of a step is the mean over the others, and the log lists it; the weights stay as nothing is learnt."""
    flags = {"max_steps": EPOCH, "learning_rate": 1e-30, "max_tokens_per_pack": tokens}
    train(run := settings_for(train=breaking("red.png"), on_bad_example="skip", **flags))
    model, processor = load_model(run.base.model)
    encoded = {example.id: encode(example, processor) for example in read_jsonl(tiny_data)}
    red = {name for name, example in encoded.items() if any("red" in image for image in example.images)}
    lost_at = {}
    for entry in log_of(run.keeping.out):
        names = examples_of(run, entry["step"], tiny_data)
        lost_at[entry["step"]] = names & red if entry["step"] > 1 else set()
        rest = [_loss(model, processor, encoded[name]) for name in names - lost_at[entry["step"]]]
        assert entry["examples"] == len(rest)
        assert entry["loss"] == pytest.approx(sum(rest) / len(rest), rel=1e-5)
    skipped = log_of(run.keeping.out, "skip")
    assert {(entry["step"], entry["example"]) for entry in skipped} == {(s, e) for s in lost_at for e in lost_at[s]}
    assert len(skipped) == sum(map(len, lost_at.values())) > 0
    for entry in skipped:
        assert entry["where"].endswith(f"train.jsonl:{int(entry['example'][1:]) + 1}")
        assert "red.png" in entry["reason"]


def test_a_step_of_which_nothing_can_be_read_ends_the_run(settings_for: MAKE, breaking) -> None:
    everything = breaking("red.png", "blue.png", "green.png", "grey.png")
    with pytest.raises(InputError, match=r"no example of a step can be read: .*train\.jsonl:\d+: .*\.png"):
        train(settings_for(train=everything, on_bad_example="skip", max_steps=8))


def test_a_full_disk_keeps_the_checkpoint_before(settings_for: MAKE, monkeypatch) -> None:
    write = checkpoint.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if "step-000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, metadata)

    flags = {"max_steps": 6, "save_every_steps": 2, "keep_checkpoints": 9}
    run = settings_for(**flags)
    checkpoints = run.keeping.out / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(InputError, match=r"cannot write .*step-000004: .*No space left"):
            train(run)
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    train(settings_for(**flags, resume="auto"))
    train(whole := settings_for(**flags, out=run.keeping.out.parent / "whole"))
    assert same(weights(run.keeping.out), weights(whole.keeping.out))


def test_a_disk_that_fills_up_at_the_end_keeps_the_last_checkpoint(settings_for: MAKE, monkeypatch) -> None:
    def full(self: Any, folder: Path, **named: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Phi3VForCausalLM, "save_pretrained", full)
        with pytest.raises(InputError, match=r"cannot write .*final: .*No space left"):
            train(run := settings_for(max_steps=2))
    assert {file.name for file in run.keeping.out.iterdir()} == {
        *("config.json", "environment.json", "images.json", "lengths.json", "warnings.json"),
        *("log.jsonl", "checkpoints", ".lock"),
    }
    train(settings_for(max_steps=2, resume="auto"))
    assert (run.keeping.out / "final").is_dir()


def test_every_file_of_eval_has_its_own_scores(
    settings_for: MAKE, tiny_data: Path, tmp_path: Path, log_of: LOG
) -> None:
    hard = tmp_path / "hard.jsonl"
    hard.write_text("".join(tiny_data.read_text().splitlines(keepends=True)[:3]))
    flags = {"eval": (tiny_data, Path(f"few={hard}")), "image_root": tiny_data.parent / "images"}

    def length(prediction: str, answers: list[str]) -> float:
        return float(len(answers[0]))

    run = settings_for(max_steps=2, eval_every_steps=1, best="few/loss", metrics=("bleu",), **flags)
    result = train(run, metrics=(length,))
    folder = run.keeping.out
    assert [(entry["step"], entry.get("set")) for entry in log_of(folder, "eval")] == [
        (step, name) for step in (0, 1, 2, result["step"]) for name in (None, "few")
    ]
    few = [entry["metrics"]["loss"] for entry in log_of(folder, "eval") if "set" in entry]
    assert result["step"] == min((1, 2), key=lambda step: few[step])
    assert result["sets"]["few"]["final"]["questions"] == 3
    assert result["sets"]["few"]["final"]["length"] == pytest.approx((3 + 3 + 5) / 3)  # red, yes, maybe
    assert result["final"].keys() == {"loss", "accuracy", "bleu", "length", "questions"}
    assert result["sets"]["few"]["before"]["loss"] == few[0]
    assert len((folder / "predictions.few.jsonl").read_text().splitlines()) == 3
    assert len((folder / "predictions-before.few.jsonl").read_text().splitlines()) == 3
    report = (folder / "report.html").read_text()
    assert "accuracy, few" in report
    assert "validation, few" in report


@pytest.fixture
def scored(settings_for: MAKE, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run of ten steps with an evaluation after every second, whose accuracies are given; it is trained."""

    def prepare(*accuracies: float, **flags: Any) -> Run:
        scores = iter(accuracies)
        monkeypatch.setattr(
            scoring, "score", lambda predictions, *more: {"accuracy": next(scores), "questions": len(predictions)}
        )
        chosen = {"max_steps": 10, "eval": tiny_data, "eval_limit": 1, "eval_every_steps": 2, "best": "accuracy"}
        return settings_for(**{**chosen, "eval_before": False, "keep_checkpoints": 1, "save_every_steps": 1, **flags})

    return prepare


def test_the_best_model_is_kept(scored: Callable[..., Run], tmp_path: Path, capsys) -> None:
    """Of equal ones the first; its checkpoint stays beside the newest."""
    result = train(run := scored(0.1, 0.6, 0.3, 0.6, 0.5, 0.7))
    found = {
        path.name: json.loads((path / "state.json").read_text()) for path in (run.keeping.out / "checkpoints").iterdir()
    }
    assert {name: state["metric"] for name, state in found.items()} == {"step-000004": 0.6, "step-000010": 0.5}
    assert (result["step"], result["final"]["accuracy"]) == (4, 0.7)
    best = load_file(run.keeping.out / "checkpoints/step-000004" / PART)
    final = weights(run.keeping.out)
    assert all(torch.equal(final[name].flatten(), best[f"weight/{name}"]) for name in final if f"weight/{name}" in best)
    said = capsys.readouterr().out
    assert "final/ is the model after step 4, the best by accuracy" in said
    assert "(as it was after step 4)" in said
    assert "step of the model" in (run.keeping.out / "report.html").read_text()
    last = train(scored(0.1, 0.6, 0.3, 0.6, 0.7, best="last", out=tmp_path / "last"))
    assert last["step"] == 10
    assert not same(weights(tmp_path / "last"), final)


def test_a_best_model_that_is_damaged_is_passed_over_aloud(scored: Callable[..., Run], capsys, monkeypatch) -> None:
    save = room.save_checkpoint

    def damaging(folder: Path, step: int, **named: Any) -> None:
        path = save(folder, step, **named)
        if step == 4:
            (path / PART).write_bytes(b"half")

    monkeypatch.setattr(room, "save_checkpoint", damaging)
    assert train(scored(0.1, 0.6, 0.3, 0.4, 0.5, 0.7))["step"] == 10
    assert "step-000004" in capsys.readouterr().out.partition("damaged checkpoint passed over:")[2]


def test_a_run_without_gain_ends_early_also_when_it_was_killed_then(
    scored: Callable[..., Run], tmp_path: Path, log_of: LOG, capsys, monkeypatch
) -> None:
    accuracies = (0.1, 0.6, 0.3, 0.6, 0.7)
    whole = train(scored(*accuracies, early_stopping=2, out=tmp_path / "whole"))
    assert whole["step"] == 4
    assert [entry["step"] for entry in log_of(tmp_path / "whole")] == list(range(1, 9))
    assert "none of 2 evaluations is better than after step 4" in capsys.readouterr().out
    killed = scored(*accuracies, early_stopping=2, out=tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(room, "finish", lambda *unused: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(killed)
    again = scored(0.7, early_stopping=2, out=tmp_path / "killed", resume="auto")
    assert train(again) == whole
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_metric_that_no_evaluation_has_is_refused(scored: Callable[..., Run]) -> None:
    with pytest.raises(InputError, match=r"--best bleu: the evaluation has no such metric; it has loss, accuracy, "):
        train(scored(0.1, best="bleu"))


def test_a_full_gpu_is_told_what_takes_less(settings_for: MAKE, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*unused: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(replicated.Replicated, "learn", full)
    with pytest.raises(InputError) as caught:
        train(settings_for(eval_before=False))
    assert str(caught.value).startswith("step 1: out of GPU memory in a pack of ")
    assert "--activation-checkpointing full" in str(caught.value)
    assert str(caught.value).endswith("(CUDA out of memory. Tried to allocate 2.00 GiB.)")


# -- trackers -------------------------------------------------------------------------------------------------------


def test_a_tracker_receives_the_log(settings_for: MAKE, tiny_data: Path, log_of: LOG) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard here")

    train(run := settings_for(max_steps=2, eval=tiny_data, eval_limit=2, track=("tensorboard",)))
    files = list(run.keeping.out.rglob("events.out.tfevents.*"))
    events = reader.EventAccumulator(str(next(file for file in files if file.stat().st_size > 1000).parent))
    events.Reload()
    assert [point.value for point in events.Scalars("loss")] == pytest.approx(
        [e["loss"] for e in log_of(run.keeping.out)]
    )
    assert len(events.Scalars("eval/accuracy")) == 2

"""Training from the flags to the run folder, on a checkpoint of 70,000 parameters and 14 examples, in float32."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import phi3v.train as room
from phi3v import checkpoint
from phi3v.config import Run
from phi3v.data.chat import Encoded, encode, expand
from phi3v.data.image import num_image_tokens
from phi3v.data.plan import PlanSettings, plan_epoch
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.data.tree import Lengths, PackLimits
from phi3v.errors import InputError
from phi3v.model import Phi3VForCausalLM
from phi3v.model.loading import load_model
from phi3v.model.vision import ImageEmbedding
from phi3v.runlog import RunLog
from phi3v.train import train

MAKE = Callable[..., Run]
LOG = Callable[..., list[dict[str, Any]]]
EPOCH = 4  # steps


def weights(run: Path) -> dict[str, torch.Tensor]:
    final = run / "final"
    return load_file(next(file for file in final.iterdir() if file.suffix == ".safetensors"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- a whole run -----------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_everything(finished_run: Path) -> None:
    assert {file.name for file in finished_run.iterdir()} == {
        *("config.json", "environment.json", "log.jsonl", "checkpoints", "final"),
        *("predictions.jsonl", "metrics.json", "report.html"),
    }
    assert [path.name for path in (finished_run / "checkpoints").iterdir()] == ["step-000120"]
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
    assert found == [("before", 0, 5), ("during", 60, 5), ("final", 120, 15)]


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
    learnt = load_file(run.keeping.out / "checkpoints/step-000002/weights.safetensors")
    assert {tensor.dtype for tensor in learnt.values()} == {torch.float32}


def test_the_logged_loss_is_the_mean_over_examples_of_their_mean(
    settings_for: MAKE, tiny_data: Path, log_of: LOG
) -> None:
    """The first step has a learning rate of zero, so the second sees the initial weights too."""
    train(run := settings_for(max_steps=2, warmup_steps=2))
    model, processor = load_model(run.base.model)
    encoded = [encode(example, processor) for example in read_jsonl(tiny_data)]
    plan = plan_epoch(Lengths.of(encoded), _plan_settings(run), seed=run.keeping.seed, epoch=0)
    for step, entry in enumerate(log_of(run.keeping.out)):
        losses = [_loss(model, processor, encoded[index]) for index in plan.examples(step)]
        assert len(losses) == 4
        assert entry["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def _plan_settings(run: Run) -> Any:
    limits = PackLimits(max_tokens_per_pack=8192, max_crops_per_pack=64)
    return PlanSettings(batch_size=run.data.batch_size, limits=limits)


def _loss(model: Any, processor: Phi3VProcessor, example: Encoded) -> float:
    """Of one example, by the forward pass everyone knows."""
    counts = [num_image_tokens(*size) for size in example.image_sizes]
    ids = torch.from_numpy(expand(example.ids, processor.image_token_id, counts)).long()
    text = ids != processor.image_token_id
    supervised = torch.zeros_like(text)
    supervised[text] = torch.from_numpy(example.supervised[example.ids != processor.image_token_id])
    labels = ids.masked_fill(~supervised, -100)
    pictures = processor("<|image_1|>", [Image.open(example.images[0])]) if example.images else {}
    images = {name: pictures[name] for name in ("pixel_values", "image_sizes") if name in pictures}
    with torch.no_grad():
        return model.eval()(input_ids=ids[None], labels=labels[None], **images).loss.item()


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
    ("frozen", "still"),
    [(("vision",), "img_processor"), (("projector",), "img_projection"), (("embeddings",), "model.embed_tokens")],
)
def test_what_is_frozen_stays_bitwise(frozen: tuple, still: str, settings_for: MAKE, tiny_model_dir: Path) -> None:
    train(run := settings_for(freeze=frozen, max_steps=3, warmup_steps=0, weight_decay=0.5))
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


def test_two_runs_of_different_precision_in_one_process(settings_for: MAKE) -> None:
    cpu = torch.device("cpu")
    for dtype, mixed in ((torch.float32, "no"), (torch.bfloat16, "bf16"), (torch.float32, "no")):
        assert room._accelerator(settings_for(), cpu, dtype).mixed_precision == mixed


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


@pytest.mark.parametrize("mode", [{}, LORA, {"freeze_vision_model": True, "questions": "random", "batch_size": 2}])
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
        first, second = log_of(tmp_path / "whole", kind), log_of(tmp_path / "killed", kind)
        drop = ("time", "seconds", "examples_per_s", "tokens_per_s", "data_wait", "memory_gb")
        assert [{k: v for k, v in e.items() if k not in drop} for e in second] == [
            {k: v for k, v in e.items() if k not in drop} for e in first
        ]
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_without_the_random_state_it_would_not(dropping: MAKE, tmp_path: Path, log_of: LOG, monkeypatch) -> None:
    """The test above can fail: dropout does matter."""
    train(dropping(out=tmp_path / "whole", max_steps=4))
    run = dropping(out=tmp_path / "killed", max_steps=4, resume="auto")
    train_until(dropping(out=tmp_path / "killed", max_steps=4), 4, monkeypatch)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    train(run)
    assert log_of(tmp_path / "whole")[2]["loss"] == log_of(tmp_path / "killed")[2]["loss"]
    assert log_of(tmp_path / "whole")[3]["loss"] != log_of(tmp_path / "killed")[3]["loss"]


def test_a_damaged_checkpoint_is_passed_over_aloud(dropping: MAKE, tmp_path: Path, capsys, monkeypatch) -> None:
    train(dropping(out=tmp_path / "whole"))
    train_until(dropping(out=tmp_path / "killed"), 8, monkeypatch)
    checkpoints = tmp_path / "killed/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000003", "step-000006"]
    newest = checkpoints / "step-000006/weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    train(dropping(out=tmp_path / "killed", resume="auto"))
    said = capsys.readouterr().out
    assert f"damaged checkpoint passed over: {newest} has" in said
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
        patch.setattr(room, "baselines", lambda *unused: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(run)
    assert not (run.keeping.out / "metrics.json").exists()
    before = weights(run.keeping.out)
    train(dropping(max_steps=3, eval=tiny_data, resume="auto"))
    assert same(weights(run.keeping.out), before)
    assert [e["split"] for e in log_of(run.keeping.out, "eval")] == ["before", "final"]
    assert len(log_of(run.keeping.out)) == 3


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"learning_rate": 1e-3}, "--learning-rate was 0.003 in .*, now it is 0.001"),
        ({"batch_size": 2}, "--batch-size was 4 in .*, now it is 2"),
        ({"seed": 1}, "--seed was 42 in .*, now it is 1"),
        ({"max_steps": 20}, "--max-steps was 5 in .*, now it is 20"),
        (LORA, "--lora was False in .*, now it is True"),
        ({"freeze": ("vision",)}, r"--freeze was \[\] in .*, now it is \['vision'\]"),
    ],
)
def test_other_flags_are_refused_by_name_when_a_run_goes_on(
    changed: dict, flag: str, settings_for: MAKE, monkeypatch
) -> None:
    run = settings_for(max_steps=5)
    run.keeping.out.mkdir()
    (run.keeping.out / "config.json").write_text(json.dumps(run.to_dict()))
    with pytest.raises(InputError, match=f"--resume: {flag}"):
        train(settings_for(**{"max_steps": 5, **changed}, resume="auto"))


def test_a_run_does_not_go_on_with_other_data(settings_for: MAKE, tiny_data: Path, monkeypatch) -> None:
    copy = tiny_data.with_name("copy.jsonl")
    copy.write_bytes(tiny_data.read_bytes())
    try:
        start = settings_for(train=copy, max_steps=3, save_every_steps=1)
        train_until(start, 2, monkeypatch)
        copy.write_bytes(tiny_data.read_bytes().replace(b"maybe", b"never"))
        with pytest.raises(InputError, match=r"--train .*copy.jsonl has changed since the run began"):
            train(settings_for(train=copy, max_steps=3, save_every_steps=1, resume="auto"))
    finally:
        copy.unlink()


def test_what_surrounds_the_loop_may_change(settings_for: MAKE, monkeypatch) -> None:
    train_until(settings_for(max_steps=3, save_every_steps=1, keep_checkpoints=1), 3, monkeypatch)
    run = settings_for(max_steps=3, save_every_steps=2, keep_checkpoints=3, resume="auto")
    train(run)
    assert sorted(path.name for path in (run.keeping.out / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_not_finite_names_the_examples_of_the_step(
    loss: str, settings_for: MAKE, changed_model, tiny_data: Path, tiny_model_dir: Path
) -> None:
    head = load_file(tiny_model_dir / "model.safetensors")["lm_head.weight"]
    head[5] = float(loss)
    run = settings_for(model=changed_model(tensors={"lm_head.weight": head}))
    with pytest.raises(InputError, match=r"step 1: the loss is not finite; its examples are (e\d+(, )?){4}$") as caught:
        train(run)
    processor = Phi3VProcessor.from_pretrained(run.base.model)
    encoded = [encode(example, processor) for example in read_jsonl(tiny_data)]
    plan = plan_epoch(Lengths.of(encoded), _plan_settings(run), seed=run.keeping.seed, epoch=0)
    assert set(str(caught.value).split(" are ")[1].split(", ")) == {f"e{index}" for index in plan.examples(0)}


def test_a_full_disk_keeps_the_checkpoint_before(settings_for: MAKE, monkeypatch) -> None:
    write = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    flags = {"max_steps": 6, "save_every_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(InputError, match=r"cannot write .*step-000004: .*No space left"):
            train(run := settings_for(**flags))
    assert [path.name for path in (run.keeping.out / "checkpoints").iterdir()] == ["step-000002"]
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
        *("config.json", "environment.json", "log.jsonl", "checkpoints")
    }
    train(settings_for(max_steps=2, resume="auto"))
    assert (run.keeping.out / "final").is_dir()


# -- the dry run and the trackers ------------------------------------------------------------------------------------


def test_a_dry_run_tells_and_writes_nothing(settings_for: MAKE, tiny_data: Path, tmp_path: Path, capsys) -> None:
    run = settings_for(dry_run=True, freeze=("vision",), eval=tiny_data, epochs=2.0)
    assert train(run) == {}
    assert list(tmp_path.iterdir()) == []
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "--learning-rate 0.003",
        "--freeze vision",
        "fp32 on cpu, attention sdpa, num_crops 1",
        "vision 0 of 24,600 parameters",
        "decoder 31,392 of 31,392 parameters",
        "data 14 examples on 5 pages",
        "evaluation 15 questions",
        "steps 8 (4 an epoch)",
        "first step 4 examples on 2 pages",
    ):
        assert any(line in one for one in said), line
    assert all(len(line) <= 80 or str(tmp_path.parent) in line or "/" in line for line in said)


def test_a_dry_run_of_lora_counts_the_adapters(settings_for: MAKE, capsys) -> None:
    train(settings_for(dry_run=True, lora=True, lora_rank=2, freeze_vision_model=True))
    said = " ".join(capsys.readouterr().out.split())
    # two layers of (in + out) * rank: qkv 32 -> 96, o 32 -> 32, gate_up 32 -> 96, down 48 -> 32; and the head 32 -> 432
    assert f"decoder {2 * (2 * (128 + 64 + 128 + 80) + 464):,} of" in said
    assert "vision 0 of" in said


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

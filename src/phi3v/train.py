"""Training, read top-down: check, build, loop, save, score.

Invariant: the loss of a step is the original objective (`phi3v.data.plan`), whatever the packing; and a run that is
killed and resumed ends in the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.markup import escape
from rich.text import Text

from phi3v.audit import GradientAudit
from phi3v.checkpoint import load_checkpoint, make_folder, newest_checkpoint, save_checkpoint, write_text, written_whole
from phi3v.config import Run, load_run
from phi3v.data.plan import plan_epoch
from phi3v.data.processor import Phi3VProcessor
from phi3v.errors import InputError
from phi3v.evaluate import answer, evenly, write_predictions
from phi3v.feed import TrainingData, read_data, steps
from phi3v.hardware import environment, name_of, peak_memory_gb, pick_device, pick_dtype
from phi3v.loss import weighted_cross_entropy
from phi3v.memory import estimate
from phi3v.metrics import baselines, score
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.loading import load_config, load_model, save_model
from phi3v.model.parts import add_lora, count_parameters, freeze, set_precision, widen
from phi3v.model.phi3v import Phi3VForCausalLM
from phi3v.optim import build_optimizer, build_schedule
from phi3v.report import write_report
from phi3v.runlog import RunLog, say, start_trackers

BIG_MODEL = 1_000_000_000  # parameters above which `--activation-memory auto` recomputes on CUDA


def train(run: Run) -> dict[str, Any]:
    """Trains, saves and scores; returns what `metrics.json` holds (nothing for a dry run).

    Writes the run folder `run.keeping.out`: config.json, environment.json, log.jsonl, checkpoints/, final/,
    predictions.jsonl, metrics.json, report.html. Raises InputError for everything a user can mend.
    """
    run.check()
    device = pick_device()
    dtype = pick_dtype(run.base.dtype, device)
    start_from = _claim_folder(run)

    processor = Phi3VProcessor.from_pretrained(run.base.model, num_crops=run.base.num_crops)
    config = load_config(run.base.model)
    if config.attention_dropout and run.base.attention == "flex_attention":
        raise InputError(f"--attention flex_attention has no dropout, {run.base.model} asks for it: choose sdpa")
    if device.type == "cpu" and run.base.attention == "flex_attention":
        raise InputError("--attention flex_attention has no backward pass on a CPU: choose sdpa")
    data = read_data(run, processor, config, check_first=start_from is None)
    total_steps = data.total_steps(run)
    if run.keeping.dry_run:
        _list_settings(run)
        _describe(run, data, _build_model(run, dtype, device, weights=False), config, dtype, total_steps)
        return {}

    torch.manual_seed(run.keeping.seed)
    model = _build_model(run, dtype, device)
    optimizer = build_optimizer(model, run.optim)
    schedule = build_schedule(optimizer, run.optim, total_steps)
    accelerator = _accelerator(run, device, dtype)
    learner = accelerator.prepare(optimizer)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": accelerator.scaler}

    folder = run.keeping.out
    _describe(run, data, model, config, dtype, total_steps)
    if start_from is None:
        make_folder(folder)
        write_text(folder / "config.json", json.dumps(run.to_dict(), indent=1))
        write_text(folder / "environment.json", json.dumps({**environment(device), "data": _digests(run)}, indent=1))
    step = load_checkpoint(start_from, **state) if start_from else 0
    start_trackers(accelerator, folder, run.to_dict())

    scorer = _Scorer(run, model, processor, data, dtype)
    audit = GradientAudit(model)
    with RunLog(
        folder, total_steps=total_steps, first_step=step, accelerator=accelerator, show=run.keeping.progress
    ) as log:
        if step == 0 and run.evaluation.eval_before and data.questions:
            scorer.score("before", step, 0.0, log)
        model.train()
        for batch in steps(run, data, device, first_step=step, total_steps=total_steps):
            started, loss = time.monotonic(), torch.zeros((), device=device)
            names: list[str] = []
            for micro in batch.packs():
                pack = micro.pack.to(device, non_blocking=True)
                names += pack.ids
                with accelerator.autocast():
                    logits = model(pack=pack).logits
                    pack_loss = weighted_cross_entropy(logits, pack.targets, pack.weights)
                accelerator.backward(pack_loss)
                loss += pack_loss.detach()
            rate = float(schedule.get_last_lr()[0])
            norm = float(accelerator.clip_grad_norm_(model.parameters(), run.optim.max_grad_norm))
            _stop_if_not_finite(float(loss), norm, names, step + 1, scaled=accelerator.scaler is not None)
            audit.check(images=batch.crops > 0, skipped=not math.isfinite(norm))
            learner.step()
            if not learner.step_was_skipped:
                schedule.step()
            learner.zero_grad(set_to_none=True)
            step += 1
            seconds = time.monotonic() - started + batch.first_wait
            memory, skipped = peak_memory_gb(device), learner.step_was_skipped
            log.step(batch.entry(step, float(loss), rate, norm, seconds, memory, skipped))
            if (every := run.evaluation.eval_every_steps) and step % every == 0 and step < total_steps:
                scorer.score("during", step, step / data.steps_per_epoch, log)
            if step == total_steps or ((every := run.keeping.save_every_steps) and step % every == 0):
                keep = run.keeping.keep_checkpoints
                save_checkpoint(folder / "checkpoints", step, **state, keep=keep)

        # What is scored last is what was saved: the weights rounded to the base checkpoint's own precision.
        _to_base_precision(model, config)
        with written_whole(folder / "final") as final:
            save_model(model, processor, final, carry_from=run.base.model)
        widen(model, dtype)
        result = scorer.result(step, log)
    accelerator.end_training()
    write_text(folder / "metrics.json", json.dumps(result, indent=1))
    report = write_report(folder)
    _announce(result, report)
    return result


# -- the run folder --------------------------------------------------------------------------------------------------


def _claim_folder(run: Run) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start. Nothing that exists is ever overwritten."""
    folder, resume = run.keeping.out, run.keeping.resume
    if run.keeping.dry_run:
        return None
    if (folder / "metrics.json").exists():
        raise InputError(f"--out {folder} holds a finished run: choose another folder")
    started = (folder / "config.json").exists()
    if not started:
        if resume and folder.exists():
            raise InputError(f"--resume: {folder} holds no run, it has no config.json")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {folder} is a file: choose another folder")
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"--out {folder} is not empty and holds no run: choose another folder")
        return None  # the folder is made when there is something to put in it
    if not resume:
        raise InputError(
            f"--out {folder} holds an unfinished run: add --resume to go on with it, or choose another folder"
        )
    _same_settings(run, load_run(folder))
    _same_data(run, folder)
    newest, complaints = newest_checkpoint(folder / "checkpoints")
    for complaint in complaints:
        say(f"[yellow]damaged checkpoint passed over:[/] {escape(complaint)}")
    say(escape(f"resuming from {newest}" if newest else f"no whole checkpoint in {folder}: starting again at step 0"))
    return newest


def _same_settings(run: Run, before: Run) -> None:
    """Going on exactly means with the same settings; only what surrounds the loop may change."""
    ours, theirs = run.to_dict(), before.to_dict()
    for group in ours:
        for name, value in ours[group].items():
            free = group == "keeping" and name != "seed"
            if not free and theirs[group].get(name) != value:
                flag = name.replace("_", "-")
                raise InputError(
                    f"--resume: --{flag} was {theirs[group].get(name)} in {before.keeping.out}, now it is {value}"
                )


def _same_data(run: Run, folder: Path) -> None:
    """Nor may the data files: their digests were kept with the run."""
    file = folder / "environment.json"
    before = json.loads(file.read_text()).get("data", {}) if file.exists() else {}
    for flag, digest in _digests(run).items():
        if before.get(flag, digest) != digest:
            path = getattr(run.data, flag)
            raise InputError(f"--resume: --{flag} {path} has changed since the run began; start a new run with it")


def _digests(run: Run) -> dict[str, str]:
    """SHA-256 of the data files, by flag."""
    files = {"train": run.data.train, "eval": run.data.eval}
    return {flag: hashlib.sha256(file.read_bytes()).hexdigest() for flag, file in files.items() if file}


# -- model -----------------------------------------------------------------------------------------------------------


def _build_model(run: Run, dtype: torch.dtype, device: torch.device, *, weights: bool = True) -> Any:
    """What learns in float32, the rest in `dtype`, on the device; without `weights`, an empty shell."""
    tuning = run.tuning
    if weights:
        model, _ = load_model(run.base.model, attention=run.base.attention)
    else:
        with torch.device("meta"):
            model = Phi3VForCausalLM(load_config(run.base.model))
    freeze(model, tuning.frozen)
    if tuning.lora:
        model = add_lora(
            model,
            frozen=tuning.frozen,
            rank=tuning.lora_rank,
            alpha=tuning.alpha,
            dropout=tuning.lora_dropout,
            init=tuning.lora_init if weights else "default",
            dora=tuning.dora,
            rslora=tuning.rslora,
        )
    set_precision(model, dtype)
    if _recompute(run, model, device):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device) if weights else model


def _recompute(run: Run, model: Any, device: torch.device) -> bool:
    if run.tuning.activation_memory != "auto":
        return run.tuning.activation_memory == "full"
    return device.type == "cuda" and sum(p.numel() for p in model.parameters()) > BIG_MODEL


def _to_base_precision(model: Any, config: Phi3VConfig) -> None:
    """Full weights go back to the precision of the checkpoint they came from; adapters stay in float32."""
    if not hasattr(model, "peft_config") and isinstance(config.dtype, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(config.dtype)


def _accelerator(run: Run, device: torch.device, dtype: torch.dtype) -> Accelerator:
    mixed = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    track = list(run.keeping.track)
    AcceleratorState._reset_state()  # accelerate keeps the precision of the process's first run, and refuses another
    return Accelerator(
        cpu=device.type == "cpu", mixed_precision=mixed, log_with=track or None, project_dir=str(run.keeping.out)
    )


def _stop_if_not_finite(loss: float, norm: float, names: Sequence[str], step: int, *, scaled: bool) -> None:
    """With loss scaling a gradient may overflow (the step is skipped and the scale halved); the loss never may."""
    bad = "loss" if not math.isfinite(loss) else "gradient" if not math.isfinite(norm) else None
    if bad == "loss" or (bad and not scaled):
        raise InputError(f"step {step}: the {bad} is not finite; its examples are {', '.join(dict.fromkeys(names))}")


# -- scores ----------------------------------------------------------------------------------------------------------


class _Scorer:
    """Evaluations before, during and after training, on the same questions."""

    def __init__(self, run: Run, model: Any, processor: Phi3VProcessor, data: TrainingData, dtype: torch.dtype) -> None:
        self.run, self.model, self.processor, self.data, self.dtype = run, model, processor, data, dtype

    def score(self, split: str, step: int, epoch: float, log: RunLog) -> dict[str, float]:
        """`split` is before, during or final; only the final one takes all questions and keeps the predictions."""
        started, limits = time.monotonic(), self.data.settings.limits
        when = {"before": "before training", "during": f"after step {step}", "final": "after training"}[split]
        limit = None if split == "final" else self.run.evaluation.eval_limit
        predictions = answer(
            self.model,
            self.processor,
            evenly(self.data.questions, limit),
            limits=limits,
            reading=self.data.reading,
            max_new_tokens=self.run.evaluation.max_new_tokens,
            dtype=self.dtype,
            title=f"evaluating {when}",
            progress=self.run.keeping.progress,
        )
        if split == "final":
            write_predictions(self.run.keeping.out, predictions)
        metrics, seconds = score(predictions), time.monotonic() - started
        say(f"{when}: accuracy {metrics['accuracy']:.1%} on {metrics['questions']:,} questions in {seconds:.0f} s")
        log.write(
            {
                "kind": "eval",
                "step": step,
                "epoch": round(epoch, 4),
                "split": split,
                "metrics": metrics,
                "seconds": round(seconds, 3),
            }
        )
        return metrics

    def result(self, step: int, log: RunLog) -> dict[str, Any]:
        """What `metrics.json` holds: the scores before and after, beside two models that never look at a picture."""
        if not self.data.questions:
            return {"before": None, "final": None, "baselines": None}
        final = self.score("final", step, step / self.data.steps_per_epoch, log)
        entries = [json.loads(line) for line in log.file.read_text().splitlines()]
        before = next((entry["metrics"] for entry in entries if entry.get("split") == "before"), None)
        return {"before": before, "final": final, "baselines": baselines(self.data.examples, self.data.questions)}


def _announce(result: dict[str, Any], report: Path) -> None:
    if result["final"] is not None:
        before, final, floor = result["before"], result["final"], result["baselines"]
        say(f"\n[bold]accuracy on {final['questions']:,} test questions[/]")
        if before is not None:
            subset = f"   (of {before['questions']:,} of them)" if before["questions"] < final["questions"] else ""
            say(f"  before training                   {before['accuracy']:7.1%}{subset}")
        say(f"  trained model                     [bold]{final['accuracy']:7.1%}[/]")
        say(f"  best answer per question text     {floor['blind']:7.1%}   (never looks at the picture)")
        say(f"  most frequent answer              {floor['majority']:7.1%}")
    say(f"\nmodel   {escape(str(report.parent / 'final'))}\nreport  {escape(str(report))}")


# -- the resolved run ------------------------------------------------------------------------------------------------


def _describe(
    run: Run, data: TrainingData, model: Any, config: Phi3VConfig, dtype: torch.dtype, total_steps: int
) -> None:
    """What will be done: who learns, how much a step holds, how much memory it should take."""
    lengths, limits = data.lengths, data.settings.limits
    plan = plan_epoch(lengths, data.settings, seed=run.keeping.seed, epoch=0)
    first, packs = plan.packs(0)
    recompute = _recompute(run, model, pick_device())
    largest = max((pack for rank in packs for pack in rank), key=lambda pack: sum(tree.tokens for tree in pack))
    memory = estimate(
        model,
        config,
        tokens=sum(tree.tokens for tree in largest),
        crops=sum(tree.crops for tree in largest),
        rows=int(sum(lengths.supervised[i] for tree in largest for i in tree.examples)),
        bytes_per_value=dtype.itemsize,
        recompute=recompute,
    )
    _row("model", escape(run.base.model))
    _row("", f"{name_of(dtype)} on {pick_device()}, attention {run.base.attention}, num_crops {data.reading.num_crops}")
    for number, (part, (learn, every)) in enumerate(count_parameters(model).items()):
        _row("" if number else "learns", f"{part:<11}{learn:>14,} of {every:>14,} parameters")
    _row("data", f"{len(lengths):,} examples on {lengths.num_pages:,} pages")
    _row("", f"{lengths.tokens.mean():,.0f} tokens an example on average, {lengths.tokens.max():,} at most")
    if data.questions:
        _row("evaluation", f"{len(data.questions):,} questions")
    _row("steps", f"{total_steps:,} ({data.steps_per_epoch:,} an epoch)")
    _row("first step", f"{first.examples} examples on {first.pages} pages")
    _row(
        "",
        f"{first.tokens:,} tokens and {first.crops} crops in {first.packs} {'pack' if first.packs == 1 else 'packs'}",
    )
    unit, scale = ("GB", 1) if memory["total"] >= 1 else ("MB", 1000)
    parts = [f"{name} {size * scale:.1f}" for name, size in memory.items() if name != "total"]
    _row("memory", f"about {memory['total'] * scale:.1f} {unit}{', recomputing activations' if recompute else ''}")
    _row("", ", ".join(parts[:3]) + ",")
    _row("", ", ".join(parts[3:]))
    if run.optim.warmup_steps * 2 > total_steps:
        _row("[yellow]note[/]", f"{run.optim.warmup_steps} of {total_steps} steps are warm-up (--warmup-steps)")
    if len(oversized := lengths.oversized(limits)):
        _row("[yellow]note[/]", f"{len(oversized)} examples exceed a pack's limits; each gets a pack of its own")


def _row(label: str, text: str) -> None:
    say(f"[bold]{label}[/]{' ' * (12 - len(Text.from_markup(label)))}{text}")


def _list_settings(run: Run) -> None:
    """Every flag with its value; in bold what is not the default."""
    defaults = Run().to_dict()
    for group, values in run.to_dict().items():
        say(f"[bold]{group}[/]")
        for name, value in values.items():
            words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            style = "default" if value == defaults[group][name] else "bold"
            say(f"  --{name.replace('_', '-'):<26}[{style}]{escape(words)}[/]")

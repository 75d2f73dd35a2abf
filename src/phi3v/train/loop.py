"""Training, read top-down: check, build, loop, save, score.

Invariant: the loss of a step is the original objective (`packing.schedule`), whatever the packing, the engine and the
number of ranks; and a run that is killed and resumed ends in the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, cast

import torch
from rich.markup import escape
from torch.optim.lr_scheduler import LRScheduler

from phi3v.base.config import Run
from phi3v.base.console import console, say, speak
from phi3v.base.errors import InputError, RankError
from phi3v.base.files import written_whole
from phi3v.base.hardware import environment, peak_memory_gb, pick_dtype
from phi3v.base.ranks import MissingRank, Ranks, join
from phi3v.base.runfolder import RunFolder, digests
from phi3v.base.stopping import Stopped, StopRequest
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.answering import Scoring, evenly, predict
from phi3v.infer.metrics import Prediction, baselines, label_tables, score
from phi3v.model.backend import pick_attention
from phi3v.model.compiling import compile_layers
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.fp8 import learn_in_fp8
from phi3v.model.loading import load_config, save_model
from phi3v.model.parts import set_precision, widen
from phi3v.packing.pack import Pack
from phi3v.publish.report import write_report
from phi3v.train.adamw import weight_dtype
from phi3v.train.audit import GradientAudit
from phi3v.train.build import (
    build_model,
    check_attention,
    check_fp8,
    pick_compile,
    pick_recompute,
    restore_frozen,
)
from phi3v.train.checkpoint import forget, load_checkpoint, newest_checkpoint, save_checkpoint, scores
from phi3v.train.describe import describe, list_settings
from phi3v.train.engines import Engine, build_engine, pick_engine
from phi3v.train.feed import StepPacks, TrainingData, examples_of, read_data, steps
from phi3v.train.flops import Flops, achieved, device_peak_tflops, training_flops
from phi3v.train.optim import build_optimizer, build_schedule, reach
from phi3v.train.runlog import RunLog
from phi3v.train.screen import Screen
from phi3v.train.trackers import start_trackers

# A loss this many times the median of the last ones is complained of.
SPIKE, SPIKE_WINDOW = 3.0, 50


@dataclass(kw_only=True)
class _Job:
    """What the loop works with."""

    run: Run
    ranks: Ranks
    dtype: torch.dtype
    processor: Phi3VProcessor
    config: Phi3VConfig
    data: TrainingData
    engine: Engine
    schedule: LRScheduler
    total_steps: int
    scoring: Scoring
    flops: Flops
    peak: float | None
    """TFLOP/s of a device at its best, where that is known."""
    log: RunLog
    stop: StopRequest
    saved_at: int | None = None
    """The step of the newest checkpoint."""
    scores: dict[int, float]
    """Of the evaluations during training whose checkpoints are kept, by step."""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run.keeping.out)


def train(run: Run, *, published: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Trains, saves and scores; returns what `metrics.json` holds (nothing for a dry run, or one that was stopped).

    Under `torchrun` every rank calls this. Writes the run folder `run.keeping.out`: config.json, environment.json,
    images.json, lengths.json, log.jsonl, checkpoints/, final/, predictions.jsonl, metrics.json, report.html. Raises
    InputError for everything a user can mend.
    """
    run.check()
    ranks = join(60 * run.scaling.rank_timeout_minutes)
    speak(ranks.is_first)
    folder, dtype = RunFolder(run.keeping.out), pick_dtype(run.precision, ranks.device)
    with ExitStack() as held, StopRequest(run.keeping.max_minutes) as stop:
        found = ranks.first_does(lambda: folder.claim(run))
        if found.finished:
            return ranks.first_does(lambda: _already_finished(folder))
        if found.started:
            holder = ranks.first_does(lambda: held.enter_context(folder.locked()))

        processor = Phi3VProcessor.from_pretrained(run.base.model, num_crops=run.base.num_crops)
        config = load_config(run.base.model)
        attention = pick_attention(run.base.attention, ranks.device, dtype)
        check_attention(run, attention, config, ranks)
        data = read_data(run, processor, config, check_first=not found.started, ranks=ranks)
        scoring = Scoring.of(run.evaluation.score, run.evaluation.labels, data.examples)
        total_steps = data.total_steps(run)
        name, why = pick_engine(
            run.scaling.parallel, ranks, adapters=run.tuning.adapters, optimizer=run.optim.optimizer
        )
        recompute = pick_recompute(run, config, data, ranks, dtype=dtype, attention=attention, engine=name)
        compiled = pick_compile(run, name, ranks)
        if run.base.fp8:
            check_fp8(dtype, name, ranks)
        about: dict[str, Any] = {
            "dtype": dtype,
            "attention": attention,
            "engine": name,
            "ranks": ranks,
            "recompute": recompute,
            "compiled": compiled,
            "total_steps": total_steps,
        }
        if run.keeping.dry_run:
            list_settings(run)
            shell = build_model(run, attention, dtype, ranks, recompute, shell=config)
            set_precision(shell, dtype, learning=weight_dtype(run.optim.optimizer))
            describe(run, data, shell, config, **about)
            return {}

        torch.manual_seed(run.keeping.seed)
        model = build_model(run, attention, dtype, ranks, recompute)
        describe(run, data, model, config, **about)
        if why:
            say(f"[yellow]note[/]        {escape(why)}")
        flops = training_flops(model, config)
        if run.base.fp8:
            learn_in_fp8(model)
        if compiled:
            compile_layers(model)
        engine = build_engine(
            name,
            model,
            ranks,
            make_optimizer=lambda model: build_optimizer(model, run.optim, seed=run.keeping.seed),
            max_grad_norm=run.optim.max_grad_norm,
            dtype=dtype,
            optimizer=run.optim.optimizer,
        )
        schedule = build_schedule(engine.optimizer, run.optim, total_steps)
        if not found.started:
            holder = ranks.first_does(lambda: _open_folder(run, data, ranks, held, published))
        ranks.all_do(lambda: None if ranks.is_first else folder.check_shared(holder))
        step = _resume(run, ranks, engine, schedule) if found.started else 0
        log = _start_log(run, ranks, data, total_steps, step)
        with log:
            job = _Job(
                run=run,
                ranks=ranks,
                dtype=dtype,
                processor=processor,
                config=config,
                data=data,
                engine=engine,
                schedule=schedule,
                total_steps=total_steps,
                scoring=scoring,
                flops=flops,
                peak=device_peak_tflops(ranks.device, dtype),
                log=log,
                stop=stop,
                saved_at=step or None,
                scores=ranks.first_does(lambda: scores(folder.checkpoints, step)),
            )
            try:
                with log.screen:
                    _learn(job, step)
                return _finish(job)
            except Stopped:
                _say_how_to_resume(job)
                return {}


def _learn(job: _Job, step: int) -> None:
    """The loop: optimizer steps from `step` to the last. Raises Stopped when it is to end before."""
    run, ranks, engine, log = job.run, job.ranks, job.engine, job.log
    if step == 0 and run.evaluation.eval_before and job.data.questions:
        _score(job, "before", step)
    if _evaluates(job, step) and step not in job.scores:  # the run was stopped before it came to that
        _conclude_step(job, step, stops=False)
    audit, losses = GradientAudit(engine.model), list[float]()
    engine.model.train()
    feed = steps(run, job.data, ranks, first_step=step, total_steps=job.total_steps)
    while step < job.total_steps:
        _seed(run.keeping.seed, step, ranks.rank)
        batch = next(feed)
        started, loss = time.monotonic(), torch.zeros((), device=ranks.device)
        for micro in batch.packs():
            _meet(job, step)
            with _memory(step, micro.pack):
                loss += engine.learn(micro.pack.to(ranks.device, non_blocking=True), last=micro.last)
        audit.check(engine.gradients(), images=batch.images, ranks=ranks)
        reach(engine.optimizer, images=batch.images)
        rate = float(job.schedule.get_last_lr()[0])
        norm, skipped = engine.step()
        total, stops = ranks.total(float(loss), float(job.stop.reason is not None))
        overflowed = skipped and engine.scaler_state().get("scale", 0.0) >= 1.0
        if trouble := _trouble(total, norm, skipped, overflowed):
            names = ", ".join(name for names in examples_of(run, job.data, ranks, step) for name in names)
            raise InputError(f"step {step + 1}: the {trouble} is not finite; its examples are {names}")
        if not skipped:
            job.schedule.step()
        step += 1
        seconds = time.monotonic() - started + batch.first_wait
        entry = batch.entry(step, total, rate, norm, seconds, peak_memory_gb(ranks.device), skipped)
        work = job.flops.of(batch.first.step)
        log.step({**entry, **achieved(work, seconds, ranks.num, job.peak)})
        _complain(job, batch, step, total, losses)
        _conclude_step(job, step, stops=bool(stops))


def _evaluates(job: _Job, step: int) -> bool:
    """Whether there is an evaluation after this step, the last one aside."""
    every = job.run.evaluation.eval_every_steps
    return every is not None and 0 < step < job.total_steps and step % every == 0


def _conclude_step(job: _Job, step: int, *, stops: bool) -> None:
    """The evaluation and the checkpoint after a step. Raises Stopped, with a checkpoint, when the run is to end."""
    score = None
    if _evaluates(job, step) and not stops:
        try:
            score = _score(job, "during", step)["accuracy"]
        except Stopped:
            stops = True
    every = job.run.keeping.save_every_steps
    due = step == job.total_steps or (every and step % every == 0)
    if due or stops or (score is not None and score > max(job.scores.values(), default=-1.0)):
        _save(job, step, score)
    if stops and step < job.total_steps:
        raise Stopped


def _finish(job: _Job) -> dict[str, Any]:
    """Saves the model, scores it, writes the report."""
    run, ranks, folder = job.run, job.ranks, job.folder
    screen = job.log.screen
    if screen.skipped:
        say(f"[yellow]note[/]        {screen.skipped} of {job.total_steps} steps were skipped: they overflowed")
    if screen.lost:
        say(f"[yellow]note[/]        {screen.lost} times an example was skipped: log.jsonl lists them")
    # If the process that wrote the last checkpoint was killed before it could remove an older one.
    ranks.first_does(lambda: forget(job.folder.checkpoints, job.total_steps, run.keeping.keep_checkpoints))
    # What is scored last is what was saved: full weights rounded to the base checkpoint's own precision.
    rounded = isinstance(job.config.dtype, torch.dtype) and not run.tuning.adapters
    model = job.engine.final(job.config.dtype if rounded else None)
    if rounded and torch.promote_types(job.config.dtype, job.dtype) != job.dtype:
        restore_frozen(model, run)

    def save() -> None:
        with written_whole(folder.final) as final:
            save_model(model, job.processor, final, carry_from=run.base.model)

    ranks.first_does(save)
    widen(model, job.dtype)
    result: dict[str, Any] = {"before": None, "final": None, "baselines": None}
    if job.data.questions:
        result["final"] = _score(job, "final", job.total_steps, model)
        if job.scoring.labels:
            predictions = cast(list[Prediction], ranks.first_does(lambda: folder.predictions))
            result["labels"] = label_tables(predictions, job.scoring.labels)
        result["before"] = ranks.first_does(lambda: _score_before(folder))
        result["baselines"] = ranks.first_does(lambda: baselines(job.data.examples, job.data.questions))

    def conclude() -> None:
        folder.save(metrics=result)
        _announce(result, write_report(folder.path))

    ranks.first_does(conclude)
    return result


# -- the run folder --------------------------------------------------------------------------------------------------


def _open_folder(run: Run, data: TrainingData, ranks: Ranks, held: ExitStack, published: Mapping[str, Any]) -> str:
    folder = RunFolder(run.keeping.out)
    holder = held.enter_context(folder.locked())
    if folder.claim(run).started:
        raise InputError(f"--out {folder.path}: another run has begun here meanwhile")
    about = {**environment(ranks.device), "processes": ranks.num, "data": digests(run)}
    folder.save(environment=about, images=data.image_sizes, lengths=data.statistics())
    if published:
        folder.save(published=dict(published))
    folder.save(config=run.to_dict())  # last: now the folder is this run's
    return holder


def _start_log(run: Run, ranks: Ranks, data: TrainingData, total_steps: int, step: int) -> RunLog:
    """The log of a run that goes on after `step`, with those who hear it: the screen and the trackers."""
    folder, keeping = run.keeping.out, run.keeping
    trackers = start_trackers(keeping.track, folder, run.to_dict(), step) if ranks.is_first else []
    for tracker in trackers:
        say(escape(f"{tracker.name:<12}{tracker.where}"))
    screen = Screen(
        console,
        total_steps=total_steps,
        evaluates=(run.evaluation.eval_every_steps or total_steps) if data.questions else None,
        saves=keeping.save_every_steps or total_steps,
        show=keeping.progress and ranks.is_first,
    )
    return RunLog(
        folder if ranks.is_first else None,
        first_step=step,
        screen=screen,
        trackers=trackers,
    )


def _resume(run: Run, ranks: Ranks, engine: Engine, schedule: LRScheduler) -> int:
    """Goes back to where the newest whole checkpoint stands; its step, or 0 if there is none."""
    folder = run.keeping.out
    newest, complaints = newest_checkpoint(RunFolder(folder).checkpoints, ranks)
    for complaint in complaints:
        say(f"[yellow]damaged checkpoint passed over:[/] {escape(complaint)}")
    say(escape(f"resuming from {newest}" if newest else f"no whole checkpoint in {folder}: starting again at step 0"))
    return load_checkpoint(newest, engine=engine, schedule=schedule) if newest else 0


def _save(job: _Job, step: int, score: float | None = None) -> None:
    job.ranks.first_does(job.log.flush)
    save_checkpoint(
        job.folder.checkpoints,
        step,
        engine=job.engine,
        schedule=job.schedule,
        ranks=job.ranks,
        keep=job.run.keeping.keep_checkpoints,
        metric=score,
    )
    job.saved_at = step
    if score is not None:
        job.scores[step] = score


def _already_finished(folder: RunFolder) -> dict[str, Any]:
    result = folder.metrics
    say(escape(f"{folder.path} holds this run, finished: nothing is left to do"))
    _announce(result, folder.report_file if folder.report_file.exists() else write_report(folder.path))
    return result


def _say_how_to_resume(job: _Job) -> None:
    where = "before the first step" if job.saved_at is None else f"after step {job.saved_at}, which is saved"
    reason = job.stop.reason or "another process was asked to stop"
    say(escape(f"stopped {where}: {reason}. Go on with"))
    script = sys.argv[0]
    program = ["-m", "phi3v"] if Path(script).name == "__main__.py" else [script]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        program = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", *program]
    else:
        program = ["python", *program] if script.endswith(".py") else [Path(script).name]
    resume = [] if job.run.keeping.resume == "auto" else ["--resume", "auto"]
    say(escape(f"  {shlex.join([*program, *sys.argv[1:], *resume])}"))


# -- what goes wrong -------------------------------------------------------------------------------------------------


def _seed(seed: int, step: int, rank: int) -> None:
    """Dropout depends on step and rank alone: nothing random has to be saved."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def _meet(job: _Job, step: int) -> None:
    """Before a pack: is every rank here, with its data?"""
    try:
        job.ranks.meet()
    except MissingRank as error:
        names = examples_of(job.run, job.data, job.ranks, step)
        its = "; ".join(f"examples of rank {rank}: {', '.join(names[rank]) or 'none'}" for rank in error.ranks)
        raise MissingRank(f"step {step + 1}: {error} ({its})", error.ranks) from error


@contextmanager
def _memory(step: int, pack: Pack) -> Iterator[None]:
    """When the GPU's memory is full, what takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RankError(
            f"step {step + 1}: out of GPU memory in a pack of {pack.tokens:,} tokens, {pack.crops} crops. Less takes "
            "--activation-checkpointing full; smaller --max-tokens-per-pack and --max-crops-per-pack; "
            f"--optimizer adamw-bf16; --freeze-vision-model; --lora; --qlora ({str(error).splitlines()[0]})"
        ) from error


def _trouble(loss: float, norm: float, skipped: bool, overflowed: bool) -> str | None:
    """What is not finite and should be. A gradient may overflow while there is a scale to halve, the loss never may."""
    if not math.isfinite(loss):
        return "loss"
    return "gradient" if (skipped or not math.isfinite(norm)) and not overflowed else None


def _complain(job: _Job, batch: StepPacks, step: int, loss: float, losses: list[float]) -> None:
    """Examples that were skipped, and losses that leap."""
    for lost in batch.lost:
        job.log.skip(step, lost)
    if len(losses) == SPIKE_WINDOW and loss > SPIKE * (usual := median(losses)):
        names = [name for names in examples_of(job.run, job.data, job.ranks, step - 1) for name in names]
        job.log.complain(step, f"the loss is {loss:.3g}, it was {usual:.3g} (median of {SPIKE_WINDOW} steps)", names)
    losses[:] = [*losses[-SPIKE_WINDOW + 1 :], loss]


# -- scores ----------------------------------------------------------------------------------------------------------


def _score(job: _Job, split: str, step: int, model: Any = None) -> dict[str, float]:
    """`split` is before, during or final; only the final one takes all questions."""
    run, data, started = job.run, job.data, time.monotonic()
    when = {"before": "before training", "during": f"after step {step}", "final": "after training"}[split]
    limit = None if split == "final" else run.evaluation.eval_limit
    with ExitStack() as opened:
        predictions = predict(
            opened.enter_context(job.engine.whole()) if model is None else model,
            job.processor,
            evenly(data.questions, limit),
            job.scoring,
            limits=data.settings.limits,
            reading=data.reading,
            max_new_tokens=run.evaluation.max_new_tokens,
            dtype=job.dtype,
            title=f"evaluating {when}",
            progress=run.keeping.progress,
            ranks=job.ranks,
            leave_off=lambda: job.stop.reason is not None,
        )
    if split != "during":
        before = split == "before"
        job.ranks.first_does(lambda: job.folder.save_predictions(predictions, before=before))
    metrics, seconds = score(predictions), time.monotonic() - started
    say(f"{when}: accuracy {metrics['accuracy']:.1%} on {metrics['questions']:,} questions in {seconds:.0f} s")
    epoch = round(step / data.steps_per_epoch, 4)
    entry = {"kind": "eval", "step": step, "epoch": epoch, "split": split, "metrics": metrics}
    job.log.write({**entry, "seconds": round(seconds, 3)})
    return metrics


def _score_before(folder: RunFolder) -> dict[str, float] | None:
    return next((entry["metrics"] for entry in folder.log if entry.get("split") == "before"), None)


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

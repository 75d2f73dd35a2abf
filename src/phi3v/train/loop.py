"""Training, read top-down: a job is set up, the loop does its steps, the model is saved and scored.

Invariant: the loss of a step is the original objective (`packing.schedule`), whatever the packing, the engine and the
number of ranks; and a run that is killed and resumed ends in the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from rich.markup import escape

from phi3v.base.config import Run
from phi3v.base.console import say, speak
from phi3v.base.errors import InputError, RankError
from phi3v.base.files import written_whole
from phi3v.base.hardware import peak_memory_gb
from phi3v.base.ranks import MissingRank, join
from phi3v.base.runfolder import RunFolder
from phi3v.base.stopping import Stopped, StopRequest
from phi3v.infer.metrics import Metric
from phi3v.model.loading import save_model
from phi3v.model.parts import widen
from phi3v.packing.pack import Pack
from phi3v.publish.report import write_report
from phi3v.train.audit import GradientAudit
from phi3v.train.build import restore_frozen
from phi3v.train.checkpoint import checkpoints, damage, forget, load_checkpoint, save_checkpoint, scores
from phi3v.train.determinism import deterministic
from phi3v.train.engines.engine import StepResult
from phi3v.train.feed import steps
from phi3v.train.flops import achieved, peak_tflops
from phi3v.train.optim import reach
from phi3v.train.scoring import announce, evaluate, final_metrics
from phi3v.train.setup import Job, dry_run, setup

# A loss this many times the median of the last ones is reported.
SPIKE, SPIKE_WINDOW = 3.0, 50


def train(
    run: Run, *, published: Mapping[str, Any] = MappingProxyType({}), metrics: Sequence[Metric] = ()
) -> dict[str, Any]:
    """Trains, saves and scores; returns the content of `metrics.json` ({} for a dry run, and for one that was stopped).

    Under `torchrun` every rank calls this. Writes the run folder `run.keeping.out`: config.json, environment.json,
    images.json, lengths.json, log.jsonl, checkpoints/, final/, predictions.jsonl, metrics.json, report.html; and
    published.json with `published`, the score that a recipe expects. `metrics` are functions of a prediction and its
    accepted answers that are scored too, under their names. Raises InputError for everything a user can
    correct.
    """
    run.check()
    with deterministic(run.base.deterministic), StopRequest(run.keeping.max_minutes) as stop:
        ranks = join(60 * run.scaling.rank_timeout_minutes)
        speak(ranks.is_first)
        folder = RunFolder(run.keeping.out)
        state = ranks.first_does(lambda: folder.claim(run))
        if state == "finished":
            return ranks.first_does(lambda: finished_before(folder))
        if run.keeping.dry_run:
            dry_run(run, ranks, resumes=state == "unfinished")
            return {}
        own = {metric.__name__: metric for metric in metrics}
        with setup(run, ranks, stop, resumes=state == "unfinished", published=published, own_metrics=own) as job:
            try:
                with job.log.screen:
                    last = learn(job)
                return finish(job, last)
            except Stopped:
                where = f"after step {step}, which is saved" if (step := job.log.last_step) else "before the first step"
                reason = stop.reason or "another process was asked to stop"
                say(escape(f"stopped {where}: {reason}. The same command with --resume auto continues"))
                return {}


def learn(job: Job) -> int:
    """The loop: optimizer steps up to the last, which it returns: the last of all, or where `--early-stopping` ends.

    Raises Stopped, with a checkpoint, when the run is to be continued later.
    """
    run, data, ranks, engine, log = job.run, job.data, job.ranks, job.engine, job.log
    if job.first_step == 0 and run.evaluation.eval_before and data.eval_sets:
        evaluate(job, "before", 0)
    ranking = ranks.first_does(lambda: scores(job.folder.checkpoints, job.first_step))
    if evaluation_is_due(job, job.first_step) and job.first_step not in ranking:
        conclude_step(job, job.first_step, ranking, stops=False)  # the run was stopped before this evaluation
    audit, losses = GradientAudit(engine.model), deque[float](maxlen=SPIKE_WINDOW)
    peak = peak_tflops(ranks.device, job.choices.dtype)
    feed = steps(data, ranks, first_step=job.first_step)
    engine.model.train()
    for step in range(job.first_step + 1, data.total_steps + 1):
        if stagnates(job, step - 1, ranking):
            return step - 1
        seed_step(run.keeping.seed, step - 1, ranks.rank)
        with job.profiler.step(step):
            started = time.monotonic()
            with missing_rank_named(job, step):
                batch = next(feed)
                ranks.meet()  # every rank is here with its data: what follows waits for all of them
            loss = torch.zeros((), device=ranks.device)
            for micro in batch.packs():
                with out_of_memory_explained(step, micro.pack):
                    loss += engine.learn(micro.pack.to(ranks.device, non_blocking=True), last=micro.last)
            audit.check(engine.gradients(), images=batch.images, ranks=ranks)
            reach(engine.optimizer, images=batch.images)
            rate = float(job.schedule.get_last_lr()[0])
            result = engine.step()
        total, stops = ranks.total(float(loss), float(job.stop.reason is not None), meet=False)
        if trouble := trouble_of(total, result):
            names = ", ".join(ids_of(job, step))
            raise InputError(f"step {step}: the {trouble} is not finite; its examples are {names}")
        if not result.skipped:
            job.schedule.step()
        seconds = time.monotonic() - started
        log.step(
            {
                "step": step,
                "loss": total,
                "learning_rate": rate,
                "grad_norm": result.norm,
                **batch.counts(seconds),
                "memory_gb": peak_memory_gb(ranks.device),
                **achieved(job.flops.of(batch.first.step), seconds, ranks.num, peak),
                **({"skipped": True} if result.skipped else {}),
            }
        )
        for lost in batch.lost:
            log.skip(step, lost)
        if len(losses) == SPIKE_WINDOW and total > SPIKE * (usual := median(losses)):
            what = f"the loss is {total:.3g}, it was {usual:.3g} (median of {SPIKE_WINDOW} steps)"
            log.complain(step, what, ids_of(job, step))
        losses.append(total)
        conclude_step(job, step, ranking, stops=bool(stops))
    return data.total_steps


def conclude_step(job: Job, step: int, ranking: dict[int, float], *, stops: bool) -> None:
    """Does the evaluation and saves the checkpoint that are due after a step. Raises Stopped if the run is to end.

    `ranking` holds, by step, how good the evaluated models are whose checkpoints are there: a better one is saved, and
    added, in any case.
    """
    rank, last, is_asked = None, job.data.total_steps, evaluation_is_due(job, step)
    if is_asked and not stops:
        try:
            rank = how_good(evaluate(job, "during", step), job.run.evaluation.best)
        except Stopped:
            stops = True
    every = job.run.keeping.save_every_steps
    due = stops or step == last or (every is not None and step % every == 0)
    if due or (rank is not None and rank > max(ranking.values(), default=-math.inf)):
        job.ranks.first_does(job.log.flush)
        save_checkpoint(
            job.folder.checkpoints,
            step,
            engine=job.engine,
            schedule=job.schedule,
            ranks=job.ranks,
            keep=job.run.keeping.keep_checkpoints,
            metric=rank,
        )
        if rank is not None:
            ranking[step] = rank
    if stops and (step < last or (is_asked and rank is None)):
        raise Stopped


def evaluation_is_due(job: Job, step: int) -> bool:
    """Whether there is an evaluation after this step, other than the final one: after the last to compare it."""
    every, last = job.run.evaluation.eval_every_steps, job.data.total_steps
    if every is None or step == 0:
        return False
    return step % every == 0 if step < last else every < last and job.run.evaluation.best != "last"


def how_good(found: Mapping[str, Mapping[str, float]], best: str) -> float:
    """An evaluation as `--best` ranks it, the higher the better. Raises InputError for a metric that it lacks."""
    named = dict(next(iter(found.values())))
    named |= {f"{name}/{key}": value for name, scores in found.items() for key, value in scores.items()}
    name = "loss" if best == "last" else best
    if name not in named:
        raise InputError(f"--best {best}: the evaluation has no such metric; it has {', '.join(named)}")
    value = -named[name] if name.rpartition("/")[2] == "loss" else named[name]
    return value if math.isfinite(value) else -sys.float_info.max


def stagnates(job: Job, step: int, ranking: Mapping[int, float]) -> bool:
    """Whether `--early-stopping` ends the run after this step. It does so again when the run is resumed there."""
    patience, every = job.run.evaluation.early_stopping, job.run.evaluation.eval_every_steps
    best = max(ranking, key=ranking.__getitem__, default=step)
    if patience is None or every is None or step - best < patience * every:
        return False
    say(f"ended after step {step}: none of {patience} evaluations is better than after step {best} (--early-stopping)")
    return True


def restore_best(job: Job, last: int) -> int:
    """Loads the checkpoint that `--best` ranks highest, and returns its step; nothing if that is the last step."""

    def pick() -> int:
        saved, ranking = checkpoints(job.folder.checkpoints), scores(job.folder.checkpoints, last)
        for step in sorted(ranking, key=ranking.__getitem__, reverse=True):
            if step == last or (complaint := damage(saved[step])) is None:
                return step
            say(f"[yellow]damaged checkpoint passed over:[/] {escape(complaint)}")
        return last

    best = job.run.evaluation.best
    step = last if best == "last" else job.ranks.first_does(pick)
    if step != last:
        say(escape(f"final/ is the model after step {step}, the best by {best}"))
        load_checkpoint(checkpoints(job.folder.checkpoints)[step], engine=job.engine, schedule=job.schedule)
    return step


def finish(job: Job, last: int) -> dict[str, Any]:
    """Saves the best model, evaluates it and writes the report; returns the content of `metrics.json`."""
    run, ranks, folder, screen = job.run, job.ranks, job.folder, job.log.screen
    if screen.skipped:
        say(f"[yellow]note[/]        {screen.skipped} of {last} steps were skipped: they overflowed")
    if screen.lost:
        say(f"[yellow]note[/]        {screen.lost} times an example was skipped: log.jsonl lists them")
    # A process that was killed after it wrote its last checkpoint has left older ones.
    ranks.first_does(lambda: forget(folder.checkpoints, last, run.keeping.keep_checkpoints))
    step = restore_best(job, last)
    # Evaluated is what was saved: full weights rounded to the base checkpoint's own precision.
    base_dtype, dtype = job.config.dtype, job.choices.dtype
    rounds = isinstance(base_dtype, torch.dtype) and not run.tuning.adapters
    model = job.engine.final(base_dtype if rounds else None)
    if rounds and torch.promote_types(base_dtype, dtype) != dtype:
        restore_frozen(model, run)

    def save() -> None:
        with written_whole(folder.final) as final:
            save_model(model, job.processor, final, carry_from=run.base.model)

    ranks.first_does(save)
    widen(model, dtype)
    result = final_metrics(job, model, step)

    def report() -> None:
        folder.save(metrics=result)
        announce(result, write_report(folder.path))

    ranks.first_does(report)
    return result


def finished_before(folder: RunFolder) -> dict[str, Any]:
    """The result of a run that was finished in an earlier process."""
    say(escape(f"{folder.path} holds this run, finished: nothing is left to do"))
    announce(folder.metrics, folder.report_file if folder.report_file.exists() else write_report(folder.path))
    return folder.metrics


# -- a step ----------------------------------------------------------------------------------------------------------


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes dropout a function of seed, step and rank, so that no random state has to be saved."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def ids_of(job: Job, step: int) -> list[str]:
    """Ids of the examples of a step, over all ranks."""
    return [name for names in job.data.examples_of(step - 1, job.ranks.num) for name in names]


def trouble_of(loss: float, result: StepResult) -> str | None:
    """What is not finite but must be. A gradient may overflow while there is a loss scale to halve, a loss never."""
    if not math.isfinite(loss):
        return "loss"
    finite = math.isfinite(result.norm) and not result.skipped
    return None if finite or result.overflow else "gradient"


@contextmanager
def missing_rank_named(job: Job, step: int) -> Iterator[None]:
    """Adds to the error about a rank that is gone or hangs the step and the examples it was to work on."""
    try:
        yield
    except MissingRank as error:
        names = job.data.examples_of(step - 1, job.ranks.num)
        its = "; ".join(f"examples of rank {rank}: {', '.join(names[rank]) or 'none'}" for rank in error.ranks)
        raise MissingRank(f"step {step}: {error} ({its})", error.ranks) from error


@contextmanager
def out_of_memory_explained(step: int, pack: Pack) -> Iterator[None]:
    """When the GPU's memory is full, says what takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RankError(
            f"step {step}: out of GPU memory in a pack of {pack.tokens:,} tokens, {pack.crops} crops. Less takes "
            "--activation-checkpointing full; smaller --max-tokens-per-pack and --max-crops-per-pack; "
            f"--optimizer adamw-bf16; --freeze-vision-model; --lora; --qlora ({str(error).splitlines()[0]})"
        ) from error

"""Everything before the first step: from the settings of a run to a job that the loop can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.markup import escape
from torch.optim.lr_scheduler import LRScheduler

from phi3v.base.config import Run
from phi3v.base.console import console, say
from phi3v.base.errors import InputError
from phi3v.base.hardware import environment
from phi3v.base.ranks import Ranks
from phi3v.base.runfolder import RunFolder, digests
from phi3v.base.stopping import StopRequest
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.metrics import Metric
from phi3v.model.compiling import compile_layers
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.fp8 import learn_in_fp8
from phi3v.model.loading import load_config
from phi3v.model.parts import set_precision
from phi3v.train.adamw import weight_dtype
from phi3v.train.build import build_model
from phi3v.train.checkpoint import resume
from phi3v.train.choices import Choices, choose, pick_recompute
from phi3v.train.describe import describe, list_settings
from phi3v.train.engines import Engine, EngineSettings, build_engine
from phi3v.train.feed import TrainingData, image_root, read_data
from phi3v.train.flops import Flops, training_flops
from phi3v.train.optim import build_optimizer, build_schedule
from phi3v.train.profiling import Profiler, parse_steps
from phi3v.train.runlog import RunLog
from phi3v.train.screen import Screen
from phi3v.train.trackers import start_trackers


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the loop works with."""

    run: Run
    ranks: Ranks
    processor: Phi3VProcessor
    config: Phi3VConfig
    data: TrainingData
    choices: Choices
    engine: Engine
    schedule: LRScheduler
    flops: Flops
    folder: RunFolder
    log: RunLog
    stop: StopRequest
    profiler: Profiler
    own_metrics: Mapping[str, Metric]
    """Those of the recipe, by name."""
    first_step: int
    """Steps that were done before, in the run that this one resumes."""


@contextmanager
def setup(
    run: Run,
    ranks: Ranks,
    stop: StopRequest,
    *,
    resumes: bool,
    published: Mapping[str, Any],
    own_metrics: Mapping[str, Metric],
) -> Iterator[Job]:
    """Reads the data, loads the model into an engine, and opens the run folder, which is locked until the context ends.

    Raises InputError, on all ranks, for everything a user can correct; nothing is written before all is loaded.
    """
    folder = RunFolder(run.keeping.out)
    with ExitStack() as held:
        if resumes:
            holder = ranks.first_does(lambda: held.enter_context(folder.locked()))
        processor, config, data, choices, profiled = _prepare(run, ranks, resumes=resumes)
        torch.manual_seed(run.keeping.seed)
        model = build_model(run, choices.attention, choices.dtype, ranks, choices.recompute)
        describe(run, data, model, config, ranks, choices)
        flops = training_flops(model, config)
        if run.base.fp8:
            learn_in_fp8(model)
        if choices.compiled:
            compile_layers(model)
        settings = EngineSettings(
            make_optimizer=lambda model: build_optimizer(model, run.optim, seed=run.keeping.seed),
            max_grad_norm=run.optim.max_grad_norm,
            dtype=choices.dtype,
            learning=weight_dtype(run.optim.optimizer),
        )
        engine = build_engine(choices.engine, model, ranks, settings)
        schedule = build_schedule(engine.optimizer, run.optim, data.total_steps)
        if not resumes:
            holder = ranks.first_does(lambda: open_folder(run, data, ranks, held, published))
        ranks.all_do(lambda: None if ranks.is_first else folder.check_shared(holder))
        step = resume(folder.checkpoints, engine=engine, schedule=schedule, ranks=ranks) if resumes else 0
        yield Job(
            run=run,
            ranks=ranks,
            processor=processor,
            config=config,
            data=data,
            choices=choices,
            engine=engine,
            schedule=schedule,
            flops=flops,
            folder=folder,
            log=held.enter_context(open_log(run, folder, data, ranks, step)),
            stop=stop,
            profiler=held.enter_context(Profiler(profiled, folder.path / "profile", ranks.rank)),
            own_metrics=own_metrics,
            first_step=step,
        )


def dry_run(run: Run, ranks: Ranks, *, resumes: bool) -> None:
    """Prints the settings and the description of a run, for which it reads the data, but no weights."""
    _, config, data, choices, _ = _prepare(run, ranks, resumes=resumes)
    list_settings(run)
    shell = build_model(run, choices.attention, choices.dtype, ranks, choices.recompute, shell=config)
    set_precision(shell, choices.dtype, learning=weight_dtype(run.optim.optimizer))
    describe(run, data, shell, config, ranks, choices)


def _prepare(
    run: Run, ranks: Ranks, *, resumes: bool
) -> tuple[Phi3VProcessor, Phi3VConfig, TrainingData, Choices, range]:
    """All that is known of a run without weights. What can be refused before the data is read, is."""
    profiled = parse_steps(run.keeping.profile_steps)
    base = run.base
    processor = Phi3VProcessor.from_pretrained(base.model, base.num_crops, base.exif_orientation, base.image_colors)
    config = load_config(run.base.model)
    choices = choose(run, config, ranks)
    data = read_data(run, processor, config, check_first=not resumes, ranks=ranks)
    if profiled and profiled[-1] > data.total_steps:
        raise InputError(f"--profile-steps {run.keeping.profile_steps}: the run has {data.total_steps} steps")
    choices = replace(choices, recompute=pick_recompute(run, config, data, ranks, choices))
    return processor, config, data, choices, profiled


def open_folder(run: Run, data: TrainingData, ranks: Ranks, held: ExitStack, published: Mapping[str, Any]) -> str:
    """Makes the run folder and locks it for as long as `held` lasts; returns the holder of the lock."""
    folder = RunFolder(run.keeping.out)
    holder = held.enter_context(folder.locked())
    if folder.claim(run) != "new":
        raise InputError(f"--out {folder.path}: another run has begun here meanwhile")
    about = {**environment(ranks.device), "processes": ranks.num, "data": digests(run)}
    root, contents = image_root(run), data.contents
    images = {path.removeprefix(root): [*size, *contents.get(path, ())] for path, size in data.image_sizes.items()}
    folder.save(environment=about, images=images, lengths=data.statistics(), warnings={"data": data.warnings})
    if published:
        folder.save(published=dict(published))
    folder.save(config=run.to_dict())  # last: it makes the folder a run
    return holder


def open_log(run: Run, folder: RunFolder, data: TrainingData, ranks: Ranks, step: int) -> RunLog:
    """The log of a run that continues after `step`, with its screen and trackers."""
    keeping = run.keeping
    trackers = start_trackers(keeping.track, folder, run.to_dict(), step) if ranks.is_first else []
    for tracker in trackers:
        say(escape(f"{tracker.name:<12}{tracker.where}"))
    screen = Screen(
        console,
        total_steps=data.total_steps,
        evaluates=(run.evaluation.eval_every_steps or data.total_steps) if data.eval_sets else None,
        saves=keeping.save_every_steps or data.total_steps,
        show=keeping.progress and ranks.is_first,
    )
    return RunLog(folder if ranks.is_first else None, first_step=step, screen=screen, trackers=trackers)

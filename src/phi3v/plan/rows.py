"""What fits: for each training mode the best way to compute it on given devices, its memory, speed and command.

Arithmetic alone: the lengths of the data (`workload`), memory by part (`train.memory`), operations (`train.flops`) and
data sheets (`devices`). Nothing is loaded or downloaded. Invariant: a row is a whole `Run`, and its command parses to
exactly that run.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch

from phi3v.base.config import Optimizer, Run
from phi3v.base.hardware import name_of
from phi3v.base.ranks import ALONE
from phi3v.packing.schedule import ScheduleSettings, Step, schedule_epoch
from phi3v.packing.trees import Lengths, PackLimits
from phi3v.plan.devices import Hardware
from phi3v.plan.workload import Work
from phi3v.recipes import forkme
from phi3v.recipes.table import MODES, Mode, with_mode
from phi3v.train.build import build_model
from phi3v.train.engines import Parallel
from phi3v.train.flops import recomputing_flops, training_flops
from phi3v.train.memory import STEPS_LOOKED_AT, estimate, largest_pack, layers_to_recompute

NF4_SPEED = 0.87
"""Speed of 4-bit weights, which are dequantized before every product, relative to LoRA's: as in the guide's runs."""

MIN_STEPS_PER_EPOCH = 20
"""With data of the user's own the batch size is halved until an epoch has as many steps."""

PACKS = (8192, 4096)
"""Tokens per pack to try, each with one crop for every TOKENS_PER_CROP tokens. The first is the default on a GPU."""
TOKENS_PER_CROP = 128


class Start(NamedTuple):
    """The words that a command starts with, and the run that they describe without further flags."""

    words: tuple[str, ...]
    run: Run


EXTRA_OF_DATA = dict.fromkeys(("docvqa", "hateful-memes", "nlvr2"), "hub") | {"ucf101": "video", "easy-vqa": "easy-vqa"}
"""What a recipe needs to read its data."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train: a run on given devices, with its memory and speed."""

    mode: Mode
    run: Run
    start: Start
    hardware: Hardware
    engine: Parallel
    recomputed_layers: int
    num_layers: int
    """Layers that can be recomputed."""
    memory_gb: dict[str, float]
    """Memory per GPU by part, and their `total`."""
    flops_per_example: float
    """Operations of the objective, without recomputation."""
    computed_flops_per_example: float
    """The same with recomputation."""
    examples_per_epoch: float

    @property
    def fits(self) -> bool:
        return self.memory_gb["total"] <= self.hardware.budget_gb

    @property
    def examples_per_s(self) -> float | None:
        """None if the peak of the card is unknown."""
        if self.hardware.card.tflops is None:
            return None
        speed = self.hardware.devices * self.hardware.card.tflops * 1e12 * self.hardware.utilization
        return speed * (NF4_SPEED if self.run.tuning.qlora else 1) / self.computed_flops_per_example

    @property
    def hours_per_epoch(self) -> float | None:
        return None if self.examples_per_s is None else self.examples_per_epoch / self.examples_per_s / 3600

    @property
    def extras(self) -> list[str]:
        """Extras of the package that the run needs."""
        bitsandbytes = self.run.tuning.qlora or self.run.optim.optimizer == "adamw-8bit"
        of_data = [EXTRA_OF_DATA[name] for name in self.start.words[2:3] if name in EXTRA_OF_DATA]
        return ["deepspeed"] * self.engine.startswith("zero") + ["qlora"] * bitsandbytes + of_data

    @property
    def summary(self) -> str:
        engine = [self.engine] if self.hardware.devices > 1 else []
        packs = f"packs of {self.run.data.max_tokens_per_pack:,} tokens"
        card = self.hardware.card
        return ", ".join([name_of(card.dtype), card.attention, *engine, self.run.optim.optimizer, packs])

    @property
    def command(self) -> str:
        return self.command_for(self.run)

    def command_for(self, run: Run, rendezvous: str = "") -> str:
        """The shell command that starts `run`, a variation of the row's own, on the row's devices."""
        words = [*self.start.words, *flags_of(run, self.start.run)]
        return shell_command(words, self.hardware.num_gpus, self.hardware.nodes, rendezvous)


def shell_command(words: Sequence[str], num_gpus: int = 1, nodes: int = 1, rendezvous: str = "") -> str:
    """The words quoted for a shell, started by torchrun on several GPUs.

    `rendezvous` holds torchrun's flags by which the nodes find each other. Default: the guide's environment variables,
    NODE_RANK and MASTER_ADDR.
    """
    if num_gpus == nodes == 1:
        return shlex.join(words)
    rendezvous = rendezvous or "--node_rank=$NODE_RANK --master_addr=$MASTER_ADDR --master_port=29500"
    several = f" --nnodes={nodes} {rendezvous}" if nodes > 1 else ""
    return f"torchrun --nproc_per_node={num_gpus}{several} -m {shlex.join(words)}"


def flags_of(run: Run, default: Run) -> Iterator[str]:
    """The flags that turn `default` into `run`."""
    for group in dataclasses.fields(Run):
        ours, theirs = getattr(run, group.name), getattr(default, group.name)
        for field in dataclasses.fields(ours):
            value, flag = getattr(ours, field.name), field.name.replace("_", "-")
            if value == getattr(theirs, field.name):
                continue
            if isinstance(value, bool):
                yield f"--{flag}" if value else f"--no-{flag}"
            elif isinstance(value, tuple):
                yield from (f"--{flag}", *map(str, value))
            else:
                yield from (f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value))


def plan_row(
    mode: Mode, work: Work, hardware: Hardware, base: Run, recipe: ModuleType | None, options: Sequence[str]
) -> Row:
    """The best way to train in a mode.

    That is the first engine and optimizer that fit, with the packs that need the fewest operations; if nothing fits,
    whatever needs the least memory. `options` are flags of the recipe that its data depends on.
    """
    run, start = settings_of(mode, base, work.lengths, recipe, options)
    shell = build_model(run, "sdpa", hardware.card.dtype, ALONE, 0, shell=work.config)
    tried: list[Row] = []
    for engine, optimizer in ways(mode, hardware):
        for tokens, crops in packs_to_try(run):
            candidate = replace(
                run,
                data=replace(run.data, max_tokens_per_pack=tokens, max_crops_per_pack=crops),
                optim=replace(run.optim, optimizer=optimizer),
                scaling=replace(run.scaling, parallel="auto" if engine == "ddp" else engine),
            )
            tried.append(make_row(mode, candidate, start, engine, shell, work, hardware))
        if fitting := [row for row in tried if row.fits]:
            return min(fitting, key=lambda row: row.computed_flops_per_example)
    return min(tried, key=lambda row: row.memory_gb["total"])


def settings_of(
    mode: Mode, base: Run, lengths: Lengths, recipe: ModuleType | None, options: Sequence[str]
) -> tuple[Run, Start]:
    """The settings of a mode, and how a command that describes them starts."""
    table = forkme.TABLE if recipe is None else getattr(recipe, "TABLE", None)
    run = replace(base, tuning=replace(base.tuning, **MODES[mode])) if table is None else with_mode(base, table, mode)
    start = Start(("phi3v", "train"), Run())
    if recipe is not None:
        name = recipe.__name__.rpartition(".")[2].replace("_", "-")
        start = Start((*start.words, name, *options), recipe.settings())
        if table is not None:
            start = Start((*start.words, "--mode", mode), with_mode(start.run, table, mode))
    units, batch = len(lengths) if run.data.questions == "all" else lengths.num_pages, run.data.batch_size
    while recipe is None and batch > 4 and units < MIN_STEPS_PER_EPOCH * batch:
        batch //= 2
    return replace(run, data=replace(run.data, batch_size=min(batch, units))), start


def ways(mode: Mode, hardware: Hardware) -> Iterator[tuple[Parallel, Optimizer]]:
    """Engines and optimizers to try in this order: exact ones first, then those that need less memory."""
    adapters = mode in ("lora", "qlora")
    if hardware.devices > 1 and not adapters:
        yield from (("zero2", "adamw"), ("fsdp2", "adamw"))
    else:
        yield "ddp", "adamw"
    if not adapters:
        if hardware.card.dtype == torch.bfloat16:
            yield "ddp", "adamw-bf16"
        yield "ddp", "adamw-8bit"


def packs_to_try(run: Run) -> list[tuple[int, int]]:
    """Limits of tokens and crops of a pack: those of the run, and smaller ones."""
    own = run.data.max_tokens_per_pack or PACKS[0]
    smaller = [(tokens, tokens // TOKENS_PER_CROP) for tokens in PACKS if tokens < own]
    return [(own, run.data.max_crops_per_pack), *smaller]


def make_row(mode: Mode, run: Run, start: Start, engine: Parallel, shell: Any, work: Work, hardware: Hardware) -> Row:
    """The row of a run, with the fewest recomputed layers that fit, as `--activation-checkpointing auto` has it."""
    steps, largest, steps_per_epoch = look_at(work, run, hardware.devices)
    config = work.config
    num_layers = config.num_hidden_layers + config.clip["num_hidden_layers"] - 1

    def memory(recompute: int) -> dict[str, float]:
        return estimate(
            shell,
            config,
            **largest,
            bytes_per_value=hardware.card.dtype.itemsize,
            recompute=recompute,
            engine=engine,
            num_ranks=hardware.devices,
            optimizer=run.optim.optimizer,
        )

    recompute = layers_to_recompute(hardware.budget_gb, num_layers, lambda layers: memory(layers)["total"])
    examples = sum(step.examples for step in steps)
    objective = sum(map(training_flops(shell, config).of, steps))
    again = sum(recomputing_flops(shell, config, step, recompute) for step in steps)
    return Row(
        mode=mode,
        run=run,
        start=start,
        hardware=hardware,
        engine=engine,
        recomputed_layers=recompute,
        num_layers=num_layers,
        memory_gb=memory(recompute),
        flops_per_example=objective / examples,
        computed_flops_per_example=(objective + again) / examples,
        examples_per_epoch=examples / len(steps) * steps_per_epoch,
    )


def look_at(work: Work, run: Run, num_ranks: int) -> tuple[list[Step], dict[str, int], int]:
    """The first steps of an epoch, the sizes of their largest pack, and the number of steps of an epoch."""
    assert run.data.max_tokens_per_pack is not None  # as in `packs_to_try`
    limits = PackLimits(
        max_tokens_per_pack=run.data.max_tokens_per_pack,
        max_crops_per_pack=run.data.max_crops_per_pack,
        original_max=work.config.original_max_position_embeddings,
    )
    settings = ScheduleSettings(batch_size=run.data.batch_size, questions=run.data.questions, limits=limits)
    plan = schedule_epoch(work.lengths, settings, seed=run.keeping.seed, epoch=0)
    looked_at = [plan.packs(number, num_ranks) for number in range(min(len(plan), STEPS_LOOKED_AT))]
    largest = largest_pack(work.lengths, [packs for _, packs in looked_at])
    return [step for step, _ in looked_at], largest, len(plan)

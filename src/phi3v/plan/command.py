"""`phi3v plan`: what of the model can learn on which cards, how long that takes, and the command that does it.

Arithmetic alone: lengths of the data (`workload`), memory by part (`memory`), operations (`perf`) and data sheets
(`cards`). Nothing is loaded or downloaded. Invariant: a row is a whole `Run`, and its command parses to exactly that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table as Grid

from phi3v.base.cards import CARDS, Hardware, find_card, find_hardware
from phi3v.base.config import Keeping, Optimizer, Run, check_flags
from phi3v.base.console import console, say
from phi3v.base.errors import InputError
from phi3v.base.files import write_text
from phi3v.base.hardware import name_of, pick_tokens_per_pack
from phi3v.base.jsonfile import Count
from phi3v.base.ranks import ALONE
from phi3v.model.configuration import Phi3VConfig
from phi3v.packing.schedule import PlanSettings, Step, plan_epoch
from phi3v.packing.trees import Lengths, PackLimits
from phi3v.plan.jobs import (
    PAGES,
    Job,
    Machine,
    azure_job,
    command,
    create_cluster,
    find_machine,
    quota,
    sky_task,
    slurm_script,
)
from phi3v.plan.workload import Work, find_work
from phi3v.recipes import find_recipe, forkme
from phi3v.recipes.table import MODES, Mode, with_mode
from phi3v.train.build import build_model
from phi3v.train.engines import Parallel
from phi3v.train.flops import Flops, recomputing_flops, training_flops
from phi3v.train.memory import CONTEXT_GB, MEMORY_TO_USE, STEPS_LOOKED_AT, estimate, layers_to_recompute

NF4_SPEED = 0.87
"""Of 4-bit weights, which must be widened before they are multiplied: what the guide's QLoRA reaches of its LoRA."""

STEPS_PER_EPOCH = 20
"""At least, of data of one's own: with fewer examples a step holds fewer."""

PACKS = (8192, 4096)
"""Tokens of a pack that are tried. Crops go along: one for every 128 tokens."""
TOKENS_PER_CROP = 128

RANKED: tuple[Mode, ...] = ("full", "frozen", "lora", "qlora")
"""By the scores they reach (the guide's tables): the first that fits is recommended."""


# -- the rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train: what of the model learns, and how."""

    mode: Mode
    run: Run
    words: tuple[str, ...]
    """`phi3v train` and its flags: what `run` is made by."""
    fits: bool
    memory: dict[str, float]
    """GB of a device by part, and their `total`."""
    dtype: str
    attention: str
    engine: Parallel
    recompute: int
    """Layers whose activations are computed again."""
    layers: int
    """That there are."""
    flops_per_example: float
    """Of the objective, without what is computed again."""
    examples_per_s: float | None
    """None where the hardware's peak is not known."""
    hours_per_epoch: float | None
    num_gpus: int
    nodes: int
    extras: tuple[str, ...]

    @property
    def how(self) -> str:
        engine = [self.engine] if self.num_gpus * self.nodes > 1 else []
        packs = f"packs of {self.run.data.max_tokens_per_pack:,} tokens"
        return ", ".join([self.dtype, self.attention, *engine, self.run.optim.optimizer, packs])

    @property
    def command(self) -> str:
        """As a shell takes it."""
        return command(self.words, self.num_gpus, self.nodes)


def settings_of(
    mode: Mode, recipe: ModuleType | None, base: Run, lengths: Lengths, options: Sequence[str]
) -> tuple[Run, Run, list[str]]:
    """The run that a mode is, the run that its flags are told from, and the words that make the latter."""
    pristine, words = Run(), ["phi3v", "train"]
    if recipe is not None:
        pristine = recipe.settings()
        words += [recipe.__name__.rpartition(".")[2].replace("_", "-"), *options]
    if (table := getattr(recipe, "TABLE", None)) is not None:
        words += ["--mode", mode]
        run, pristine = with_mode(base, table, mode), with_mode(pristine, table, mode)
    else:
        run = with_mode(base, forkme.TABLE, mode)
        if run.tuning.adapters:
            run = replace(run, tuning=replace(run.tuning, lora_alpha=None))  # the default: twice the rank
        elif recipe is not None:  # easy-VQA has settings of its own, for all weights
            run = replace(base, tuning=run.tuning)
    units, batch = len(lengths) if run.data.questions == "all" else lengths.num_pages, run.data.batch_size
    while recipe is None and batch > 4 and units < STEPS_PER_EPOCH * batch:
        batch //= 2
    return replace(run, data=replace(run.data, batch_size=min(batch, units))), pristine, words


def flags_of(run: Run, default: Run) -> Iterator[str]:
    """The flags that make `run` of `default`."""
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


def ways(mode: Mode, hardware: Hardware) -> Iterator[tuple[Parallel, Optimizer]]:
    """Engines and optimizers, the better first: exact ones, then those that keep less."""
    if MODES[mode].keys() & {"lora", "qlora"}:
        yield "ddp", "adamw"
        return
    if hardware.devices > 1:
        yield from (("zero2", "adamw"), ("fsdp2", "adamw"))
    else:
        yield "ddp", "adamw"
    if hardware.card is not None and hardware.dtype == torch.bfloat16:
        yield "ddp", "adamw-bf16"
    if hardware.card is not None:
        yield "ddp", "adamw-8bit"


class Way(NamedTuple):
    """How a mode could be computed."""

    fits: bool
    operations: float
    """Of the steps that were looked at, with what is computed again."""
    run: Run
    engine: Parallel
    recompute: int
    memory: dict[str, float]
    steps: list[Step]
    steps_per_epoch: int


def plan_row(mode: Mode, work: Work, hardware: Hardware, base: Run, recipe: ModuleType | None, options: Any) -> Row:
    """The best way to train in a mode: the first that fits, with the packs that make it fastest; else the smallest."""
    run, default, words = settings_of(mode, recipe, base, work.lengths, options)
    shell = build_model(run, "sdpa", hardware.dtype, ALONE, 0, shell=work.config)
    flops = training_flops(shell, work.config)
    found: list[Way] = []
    for engine, optimizer in ways(mode, hardware):
        for tokens, crops in packs_to_try(run, hardware):
            packed = replace(run, data=replace(run.data, max_tokens_per_pack=tokens, max_crops_per_pack=crops))
            found.append(find_way(packed, engine, optimizer, work, hardware, shell, flops))
        if any(way.fits for way in found):
            break
    fitting = [way for way in found if way.fits]
    way = min(fitting, key=lambda way: way.operations) if fitting else min(found, key=lambda way: way.memory["total"])
    examples, per_s = sum(step.examples for step in way.steps), None
    if hardware.tflops is not None:
        speed = hardware.devices * hardware.tflops * 1e12 * hardware.share_used * (NF4_SPEED if mode == "qlora" else 1)
        per_s = examples * speed / way.operations
    each_epoch = examples / len(way.steps) * way.steps_per_epoch
    optimizer = way.run.optim.optimizer
    extras = ["deepspeed"] if way.engine.startswith("zero") else []
    extras += ["qlora"] if mode == "qlora" or optimizer == "adamw-8bit" else []
    return Row(
        mode=mode,
        run=way.run,
        words=(*words, *flags_of(way.run, default)),
        fits=way.fits,
        memory=way.memory,
        dtype=name_of(hardware.dtype),
        attention=hardware.attention,
        engine=way.engine,
        recompute=way.recompute,
        layers=every_layer(work.config),
        flops_per_example=sum(map(flops.of, way.steps)) / examples,
        examples_per_s=per_s,
        hours_per_epoch=None if per_s is None else each_epoch / per_s / 3600,
        num_gpus=hardware.num_gpus,
        nodes=hardware.nodes,
        extras=tuple(extras),
    )


def find_way(
    run: Run,
    engine: Parallel,
    optimizer: Optimizer,
    work: Work,
    hardware: Hardware,
    shell: Any,
    flops: Flops,
) -> Way:
    """The way with the fewest recomputed layers that fits: on a GPU what `--activation-checkpointing auto` finds."""
    steps, largest, per_epoch = look_at(work, run, hardware.devices)
    every, budget = every_layer(work.config), memory_budget(hardware)

    def needed(layers: int) -> dict[str, float]:
        return estimate(
            shell,
            work.config,
            **largest,
            bytes_per_value=hardware.dtype.itemsize,
            recompute=layers,
            engine=engine,
            num_ranks=hardware.devices,
            optimizer=optimizer,
        )

    tuning = run.tuning
    if hardware.card is not None:
        # What is needed falls from layer to layer, but where the decoder's last and CLIP's last are reached.
        least = min(needed(layers)["total"] for layers in (work.config.num_hidden_layers - 1, every - 1, every))
        recompute = every
        if least <= budget:
            recompute = layers_to_recompute(budget, every, lambda layers: needed(layers)["total"])
    else:
        recompute = 0 if needed(0)["total"] <= budget else every
        tuning = replace(tuning, activation_checkpointing="full" if recompute else "auto")
    memory = needed(recompute)
    return Way(
        fits=memory["total"] <= budget,
        operations=sum(flops.of(s) + recomputing_flops(shell, work.config, s, recompute) for s in steps),
        run=replace(
            run,
            tuning=tuning,
            optim=replace(run.optim, optimizer=optimizer),
            scaling=replace(run.scaling, parallel="auto" if engine == "ddp" else engine),
        ),
        engine=engine,
        recompute=recompute,
        memory=memory,
        steps=steps,
        steps_per_epoch=per_epoch,
    )


def memory_budget(hardware: Hardware) -> float:
    """GB of a device that an estimate may come to."""
    return MEMORY_TO_USE * (hardware.memory_gb - (CONTEXT_GB if hardware.card else 0.0))


def every_layer(config: Phi3VConfig) -> int:
    """Layers that can be computed again: the decoder's and those of CLIP that run."""
    return config.num_hidden_layers + config.clip["num_hidden_layers"] - 1


def packs_to_try(run: Run, hardware: Hardware) -> list[tuple[int, int]]:
    """Most tokens and crops of a pack: what the run says, and smaller. A CPU is busy enough with the smallest."""
    own = pick_tokens_per_pack(run.data.max_tokens_per_pack, torch.device("cuda" if hardware.card else "cpu"))
    crops = run.data.max_crops_per_pack or own // TOKENS_PER_CROP
    return [(own, crops), *((tokens, tokens // TOKENS_PER_CROP) for tokens in PACKS if tokens < own)]


def look_at(work: Work, run: Run, num_ranks: int) -> tuple[list[Step], dict[str, int], int]:
    """Steps of an epoch, the most of anything that a pack of theirs holds, and how many steps an epoch has."""
    assert run.data.max_tokens_per_pack is not None  # as in `packs_to_try`
    limits = PackLimits(
        max_tokens_per_pack=run.data.max_tokens_per_pack,
        max_crops_per_pack=run.data.max_crops_per_pack,
        original_max=work.config.original_max_position_embeddings,
    )
    settings = PlanSettings(batch_size=run.data.batch_size, questions=run.data.questions, limits=limits)
    plan = plan_epoch(work.lengths, settings, seed=run.keeping.seed, epoch=0)
    steps, most = [], {"tokens": 0, "crops": 0, "rows": 0}
    for number in range(min(len(plan), STEPS_LOOKED_AT)):
        step, ranks = plan.packs(number, num_ranks)
        steps.append(step)
        for pack in (pack for of_rank in ranks for pack in of_rank):
            rows = sum(int(work.lengths.supervised[i]) for tree in pack for i in tree.examples)
            sizes = (sum(tree.tokens for tree in pack), sum(tree.crops for tree in pack), rows)
            most = {name: max(most[name], size) for name, size in zip(most, sizes, strict=True)}
    return steps, most, len(plan)


# -- what is said ------------------------------------------------------------------------------------------------------


PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def show(rows: Sequence[Row], work: Work, hardware: Hardware, model: str) -> Group:
    """Tables of what fits and how, the commands, and what all of it rests on."""
    lengths = work.lengths
    about = Grid.grid(padding=(0, 2))
    about.add_row("[bold]hardware", escape(f"{hardware}{'' if hardware.here else ' (from the table of cards)'}"))
    about.add_row("[bold]model", escape(model))
    about.add_row("[bold]data", f"{len(lengths):,} examples on {lengths.num_pages:,} pages ({work.source})")
    sizes = f"{lengths.tokens.mean():,.0f} tokens and {lengths.crops.mean():.1f} crops on average"
    about.add_row("", f"{sizes}, {lengths.tokens.max():,} tokens at most (num_crops {work.num_crops})")
    unit, scale = ("GB", 1) if max(row.memory["total"] for row in rows) >= 1 else ("MB", 1000)
    memory = _grid(f"{unit} of memory on each device", "", "mode", "fits", unit, *PARTS)
    speed = _grid("how fast", "", "mode", "examples/s", "hours/epoch", "computed again")
    for number, row in enumerate(rows):
        mark = "[green]→[/]" if number == 0 and row.fits else ""
        fits = "[green]yes[/]" if row.fits else "[red]no[/]"
        memory.add_row(mark, row.mode, fits, *(f"{row.memory[part] * scale:.1f}" for part in ("total", *PARTS)))
        if row.fits:
            again = f"{row.recompute} of {row.layers} layers" if row.recompute else "nothing"
            speed.add_row(mark, row.mode, _amount(row.examples_per_s), _amount(row.hours_per_epoch), again)
    fitting = [row for row in rows if row.fits]
    shown: list[Any] = [about, memory]
    shown += [speed] if fitting else []
    shown += ["", *(f"[dim]{line}[/]" for line in assumptions(hardware))]
    for number, row in enumerate(fitting):
        needs = f"; pip install 'phi3v[{','.join(row.extras)}]'" if row.extras else ""
        mark = " [green]recommended[/]" if number == 0 else ""
        shown += [f"\n[bold]{row.mode}[/]{mark} [dim]{escape(row.how + needs)}[/]", escape(row.command)]
    if not fitting:
        least = min(rows, key=lambda row: row.memory["total"])
        shown.append(
            f"\n[bold red]nothing fits[/]: {least.mode} needs least, {least.memory['total']:.1f} GB. Fewer crops "
            "(--num-crops) are fewer tokens, and more GPUs (--num-gpus) share out what learns"
        )
    if hardware.card is None:
        shown.append(f"\n[dim]For GPUs name them: --gpu {escape(' | '.join(card.name for card in CARDS))}[/]")
    return Group(*shown)


def assumptions(hardware: Hardware) -> list[str]:
    """What the figures rest on."""
    context = f", less {CONTEXT_GB:.0f} GB for CUDA itself" if hardware.card else ""
    budget = f"{memory_budget(hardware):.1f} GB, {MEMORY_TO_USE:.0%} of a device's memory{context}"
    lines = [f"fits: what is estimated is within {budget}"]
    if hardware.tflops is None:
        return [*lines, "speed: not said, for this card's peak is not in the table"]
    peak = f"the {hardware.tflops:,.0f} TFLOP/s of its data sheet"
    if hardware.card is None:
        peak = f"the {1000 * hardware.tflops:,.0f} GFLOP/s that a product of matrices reached here just now"
    lines.append(f"speed: arithmetic, at {hardware.share_used:.0%} of {peak}")
    lines.append("       nothing was measured on a GPU; evaluations, loading and compiling come on top")
    return lines


def _grid(title: str, *columns: str) -> Grid:
    grid = Grid(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    for name in columns:
        numeric = name in ("GB", "MB", *PARTS) or "/" in name
        grid.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    return grid


def _amount(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_json(rows: Sequence[Row], work: Work, hardware: Hardware, model: str) -> dict[str, Any]:
    """The same for programs."""
    lengths = work.lengths
    return {
        "hardware": {
            "name": hardware.name,
            "memory_gb": hardware.memory_gb,
            "tflops": hardware.tflops,
            "num_gpus": hardware.num_gpus,
            "nodes": hardware.nodes,
            "share_used": hardware.share_used,
        },
        "model": model,
        "data": {
            "examples": len(lengths),
            "pages": lengths.num_pages,
            "mean_tokens": float(lengths.tokens.mean()),
            "max_tokens": int(lengths.tokens.max()),
            "mean_crops": float(lengths.crops.mean()),
            "num_crops": work.num_crops,
            "source": work.source,
        },
        "rows": [
            {
                "mode": row.mode,
                "recommended": number == 0 and row.fits,
                "fits": row.fits,
                "memory_gb": row.memory,
                "dtype": row.dtype,
                "attention": row.attention,
                "engine": row.engine,
                "optimizer": row.run.optim.optimizer,
                "max_tokens_per_pack": row.run.data.max_tokens_per_pack,
                "recomputed_layers": row.recompute,
                "tflop_per_example": row.flops_per_example / 1e12,
                "examples_per_s": row.examples_per_s,
                "hours_per_epoch": row.hours_per_epoch,
                "command": row.command,
            }
            for number, row in enumerate(rows)
        ],
    }


# -- the command -------------------------------------------------------------------------------------------------------


def plan(
    recipe: str | None = None,
    /,
    *,
    train: Path | None = None,
    eval: Path | None = None,
    image_root: Path | None = None,
    model: str | None = None,
    num_crops: Count | None = None,
    full_train: bool = False,
    gpu: str | None = None,
    num_gpus: Count | None = None,
    nodes: Count = 1,
    mode: Mode | None = None,
    out: Path | None = None,
    azure: Path | None = None,
    skypilot: Path | None = None,
    slurm: Path | None = None,
    json: bool = False,
) -> None:
    """Say what fits on which GPUs, how long it takes, and the command to run; the recommended one first.

    Arithmetic on the sizes of the model and the lengths of the data: nothing is loaded, downloaded or trained. With
    --azure, --skypilot or --slurm the recommended command becomes a job file for other machines as well.

    Args:
        recipe: A recipe (`phi3v recipes`), whose data is known by size. Or give --train.
        train: Your conversations, one JSON object a line: their pictures and texts are measured.
        eval: Conversations to be evaluated on, for the commands.
        image_root: Folder the image paths are relative to. Default: the folder `images` beside the data file.
        model: A folder with config.json, or one of the published models' names.
        num_crops: Tiles an image may be cut into. Default: the recipe's or the checkpoint's own.
        full_train: All of DocVQA instead of the mini set.
        gpu: A card, such as A100-80GB or 4090. Default: the GPUs of this machine, or its CPU.
        num_gpus: GPUs of a node. Default: 1, or as many as there are here.
        nodes: Machines.
        mode: Plan for this one only, or put it into the job file.
        out: The run folder. Default: the recipe's, or runs/plan.
        azure: Write a command job for Azure ML here, and say which quota to ask for.
        skypilot: Write a task for SkyPilot here.
        slurm: Write a batch script for SLURM here.
        json: Print JSON instead of tables.
    """
    check_flags(locals(), plan)
    if recipe is None and train is None:
        raise InputError("what is to be learnt? Name a recipe (phi3v plan docvqa), or give --train DATA.jsonl")
    if full_train and recipe != "docvqa":
        raise InputError("--full-train is for docvqa")
    module = None if recipe is None else find_recipe(recipe)
    name = "" if recipe is None else recipe.replace("_", "-") + "-full" * full_train
    options = ["--full-train"] if full_train else []
    base = module.settings() if module else Run(keeping=Keeping(out=Path("runs/plan")))
    changed = {"train": train or base.data.train, "eval": eval or base.data.eval, "image_root": image_root}
    base = replace(
        base,
        base=replace(base.base, model=model or base.base.model, num_crops=num_crops or base.base.num_crops),
        data=replace(base.data, **changed),
        keeping=replace(base.keeping, out=out or base.keeping.out),
    )
    machine = None
    if azure is not None:
        if gpu is None:
            raise InputError("--azure needs --gpu: which cards are the machines to have?")
        machine = find_machine(find_card(gpu), num_gpus)
        num_gpus = machine.gpus
    hardware = find_hardware(gpu, num_gpus, nodes)
    work = find_work(module, base, name, num_crops, train, image_root)
    rows = [plan_row(each, work, hardware, base, module, options) for each in ([mode] if mode else RANKED)]
    rows.sort(key=lambda row: not row.fits)  # stable: by what they reach
    if json:
        print(dumps(as_json(rows, work, hardware, base.base.model), indent=1))
    else:
        console.print(show(rows, work, hardware, base.base.model), soft_wrap=True)
    files = {kind: file for kind, file in (("azure", azure), ("skypilot", skypilot), ("slurm", slurm)) if file}
    if files:
        write_jobs(files, rows[0], hardware, machine, None if train is None else train.parent, quiet=json)


def write_jobs(
    files: Mapping[str, Path], row: Row, hardware: Hardware, machine: Machine | None, data: Path | None, *, quiet: bool
) -> None:
    """Writes a row as a job for each of these systems, and says where, and on Azure what it takes."""
    if hardware.card is None:
        raise InputError(f"--{next(iter(files))} needs --gpu: a job file is for machines with GPUs")
    if not row.fits:
        raise InputError("nothing fits these GPUs: no job file is written")
    job = Job(
        name=row.run.keeping.out.name,
        words=row.words,
        card=hardware.card,
        num_gpus=hardware.num_gpus,
        nodes=hardware.nodes,
        extras=row.extras,
        hours=24.0 if row.hours_per_epoch is None else row.hours_per_epoch * row.run.optim.epochs,
        out=row.run.keeping.out,
        data=data,
    )
    about: list[tuple[str, str]] = []
    for kind, file in files.items():
        if kind == "azure":
            assert machine is not None
            text = azure_job(job, machine)
        else:
            text = sky_task(job) if kind == "skypilot" else slurm_script(job)
        write_text(file, text)
        about.append((kind, f"{file} starts {row.mode}"))
    if machine is not None:
        holds = f"{machine.gpus} x {machine.card}, {machine.vcpus} vCPUs, {machine.memory_gib} GiB"
        about += [
            ("machine", f"{machine.size} ({machine.series}): {holds}; {machine.interconnect}"),
            ("quota", quota(machine, hardware.nodes)),
            ("cluster", create_cluster(machine, hardware.nodes)),
            ("page", PAGES + machine.page),
        ]
        about += [("note", machine.note)] if machine.note else []
    if not quiet:
        say("")
        for label, text in about:
            say(f"[bold]{label:<9}[/] {escape(text)}")

"""`phi3v plan`: what fits on which GPUs, how long it takes, and the command or job file that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from json import dumps
from pathlib import Path

from rich.markup import escape

from phi3v.base.cards import find_card
from phi3v.base.config import Keeping, Run, check_flags
from phi3v.base.console import console, say
from phi3v.base.errors import InputError
from phi3v.base.files import write_text
from phi3v.base.jsonfile import Count
from phi3v.plan.devices import find_hardware
from phi3v.plan.jobs import PAGES, Machine, azure_job, create_cluster, find_machine, quota, sky_task, slurm_script
from phi3v.plan.rows import Row, plan_row
from phi3v.plan.show import as_json, as_tables
from phi3v.plan.workload import find_work
from phi3v.recipes import find_recipe
from phi3v.recipes.table import Mode

BY_SCORE: tuple[Mode, ...] = ("full", "frozen", "lora", "qlora")
"""Modes by the scores they reach in the guide's tables: the first that fits is recommended."""


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
    """Show what fits on which GPUs, how long it takes, and the command to run; the recommended one first.

    The figures are calculated from the sizes of the model and the lengths of the data: nothing is loaded, downloaded or
    trained. With --azure, --skypilot or --slurm the recommended command is written as a job file for other machines.

    Args:
        recipe: A recipe (`phi3v recipes`), whose data is known by size. Or give --train.
        train: Your conversations, one JSON object a line: their images and texts are measured.
        eval: Conversations to be evaluated on, for the commands.
        image_root: Folder the image paths are relative to. Default: the folder `images` beside the data file.
        model: A folder with config.json, or one of the published models' names.
        num_crops: Tiles an image may be cut into, not counting its global view. Default: the recipe's or the
            checkpoint's own.
        full_train: All of DocVQA instead of the mini set.
        gpu: A card, such as A100-80GB or 4090. Default: the GPUs of this machine.
        num_gpus: GPUs per node. Default: 1, or all GPUs of this machine.
        nodes: Number of machines.
        mode: Plan for this mode only; a job file runs it.
        out: The run folder. Default: the recipe's, or runs/plan.
        azure: Write a command job for Azure ML to this file, and show which quota to request.
        skypilot: Write a task for SkyPilot to this file.
        slurm: Write a batch script for SLURM to this file.
        json: Print JSON instead of tables.
    """
    check_flags(locals(), plan)
    if recipe is None and train is None:
        raise InputError("nothing to plan for: name a recipe (phi3v plan docvqa), or give --train DATA.jsonl")
    if full_train and recipe != "docvqa":
        raise InputError("--full-train is for docvqa")
    if azure is not None and gpu is None:
        raise InputError("--azure needs --gpu: which cards should the machines have?")
    machine = find_machine(find_card(gpu), num_gpus) if azure is not None and gpu is not None else None
    hardware = find_hardware(gpu, machine.gpus if machine else num_gpus, nodes)
    module = None if recipe is None else find_recipe(recipe)
    base = module.settings() if module else Run(keeping=Keeping(out=Path("runs/plan")))
    own = {name: file for name, file in (("train", train), ("eval", eval)) if file}
    base = replace(
        base,
        base=replace(base.base, model=model or base.base.model, num_crops=num_crops or base.base.num_crops),
        data=replace(base.data, **own, image_root=image_root),
        keeping=replace(base.keeping, out=out or base.keeping.out),
    )
    name = "" if recipe is None else recipe.replace("_", "-") + "-full" * full_train
    work = find_work(module, base, name, num_crops, train, image_root)
    options = ["--full-train"] * full_train
    rows = [plan_row(each, work, hardware, base, module, options) for each in ([mode] if mode else BY_SCORE)]
    rows.sort(key=lambda row: not row.fits)  # stable
    if json:
        print(dumps(as_json(rows, work, hardware, base.base.model), indent=1))
    else:
        console.print(as_tables(rows, work, hardware, base.base.model), soft_wrap=True)
    files = {kind: file for kind, file in (("azure", azure), ("skypilot", skypilot), ("slurm", slurm)) if file}
    if files:
        write_jobs(files, rows[0], machine, None if train is None else train.parent, quiet=json)


def write_jobs(files: Mapping[str, Path], row: Row, machine: Machine | None, data: Path | None, *, quiet: bool) -> None:
    """Write a row as a job for each system, and print the files and the machine and quota that Azure needs for it."""
    if not row.fits:
        raise InputError("nothing fits these GPUs: no job file is written")
    about = [(kind, f"{file} starts {row.mode}") for kind, file in files.items()]
    if "skypilot" in files:
        write_text(files["skypilot"], sky_task(row, data))
    if "slurm" in files:
        write_text(files["slurm"], slurm_script(row))
    if machine is not None:
        write_text(files["azure"], azure_job(row, machine, data))
        cards = f"{machine.gpus} x {machine.card}, {machine.vcpus} vCPUs, {machine.memory_gib} GiB"
        about += [
            ("machine", f"{machine.size} ({machine.series}): {cards}; {machine.interconnect}"),
            ("quota", quota(machine, row.hardware.nodes)),
            ("cluster", create_cluster(machine, row.hardware.nodes)),
            ("page", PAGES + machine.page),
        ]
        about += [("note", machine.note)] if machine.note else []
    if not quiet:
        say("")
        for label, text in about:
            say(f"[bold]{label:<9}[/] {escape(text)}")

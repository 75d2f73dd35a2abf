"""A row as a job of Azure ML, SkyPilot or SLURM, and the Azure machine and quota that it needs.

Every job installs phi3v once per node and starts torchrun itself, so the command that runs is the command that was
planned, with the paths of the job. Nothing here connects to a service.
"""

from __future__ import annotations

import functools
import math
import re
import shlex
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from phi3v.base.cards import Card
from phi3v.base.config import Run, as_files
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, convert
from phi3v.plan.rows import Row

FILE = Path(__file__).with_name("machines.toml")
PAGES = "https://learn.microsoft.com/azure/virtual-machines/sizes/gpu-accelerated/"
SPARE_MINUTES = 15
"""The part of a job's time that remains for loading, the last step and a checkpoint."""


# -- Azure's machines --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One virtual machine of `machines.toml`, where its fields are explained."""

    size: str
    series: str
    card: str
    gpus: Count
    vcpus: Count
    memory_gib: Count
    interconnect: str
    quota: str
    page: str
    note: str = ""

    @property
    def cluster(self) -> str:
        """A name for a cluster: at most 24 letters, digits and hyphens, as Azure ML requires."""
        return self.size.removeprefix("Standard_").replace("_", "-").lower()[:24].rstrip("-")


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The content of `machines.toml`."""

    azure: tuple[Machine, ...]
    skypilot: dict[str, str]


@functools.cache
def load_catalog() -> Catalog:
    return convert(tomllib.loads(FILE.read_text(encoding="utf-8")), Catalog, FILE.name)


def find_machine(card: Card, num_gpus: int | None) -> Machine:
    """The Azure machine with these GPUs, by default the one with the most. Raises InputError with what exists."""
    machines = load_catalog().azure
    sizes = {machine.gpus: machine for machine in machines if machine.card == card.name}
    if not sizes:
        cards = ", ".join(dict.fromkeys(machine.card for machine in machines))
        raise InputError(f"--azure: no machine has a {card.name}; --gpu can be {cards}")
    if (found := sizes.get(max(sizes) if num_gpus is None else num_gpus)) is None:
        choices = ", ".join(f"{gpus} ({sizes[gpus].size})" for gpus in sorted(sizes))
        raise InputError(f"--num-gpus {num_gpus}: Azure's machines with {card.name} have {choices}")
    return found


def quota(machine: Machine, nodes: int) -> str:
    """The quota to request, in a sentence."""
    return (
        f'{nodes * machine.vcpus} vCPUs of "{machine.quota}" ({nodes} x {machine.size}), on the Quotas page of the '
        "portal under Machine learning, in the region of your workspace"
    )


def create_cluster(machine: Machine, nodes: int) -> str:
    """The command that creates the cluster of a job. The cluster costs nothing while no job runs."""
    return (
        f"az ml compute create --type AmlCompute --name {machine.cluster} --size {machine.size} "
        f"--min-instances 0 --max-instances {nodes} --resource-group GROUP --workspace-name WORKSPACE"
    )


# -- jobs --------------------------------------------------------------------------------------------------------------


def azure_job(row: Row, machine: Machine, data: Path | None = None) -> str:
    """A command job of Azure ML, for `az ml job create --file FILE` in a checkout of phi3v.

    `data` is the folder of the user's own data, which is uploaded with the job.
    """
    run = _relocated(row.run, data, "${{inputs.data}}", "${{outputs.runs}}")
    rendezvous = "--node_rank=$NODE_RANK --master_addr=$MASTER_ADDR --master_port=$MASTER_PORT"
    # Azure ML does not see its placeholders in single quotes, which the shell needs around "$": double quotes do.
    start = re.sub(r"'(\$\{\{[^']+)'", r'"\1"', row.command_for(run, rendezvous))
    cluster = {"cluster": machine.cluster, "cluster_command": create_cluster(machine, row.hardware.nodes)}
    return _filled("azure.yml.jinja", row, start=start, data=data and data.resolve(), **cluster)


def sky_task(row: Row, data: Path | None = None) -> str:
    """A task of SkyPilot, for `sky launch FILE` in a checkout of phi3v. `data` as in `azure_job`."""
    accelerator = load_catalog().skypilot.get(row.hardware.card.name, row.hardware.card.name)
    first = '$(echo "$SKYPILOT_NODE_IPS" | head -n 1)'
    rendezvous = f"--node_rank=$SKYPILOT_NODE_RANK --master_addr={first} --master_port=29500"
    start = row.command_for(_relocated(row.run, data, "/data", "/runs"), rendezvous)
    return _filled("skypilot.yaml.jinja", row, start=start, data=data, accelerator=accelerator)


def slurm_script(row: Row) -> str:
    """A batch script for SLURM's `sbatch`. If its time ends before the run does, it queues itself again."""
    keeping = replace(row.run.keeping, max_minutes=_minutes(row) - SPARE_MINUTES, resume="auto")
    rendezvous = '--rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$MASTER_ADDR:29500"'
    start = row.command_for(replace(row.run, keeping=keeping), rendezvous)
    return _filled("slurm.sh.jinja", row, start=start, metrics=shlex.quote(str(keeping.out / "metrics.json")))


def _filled(template: str, row: Row, **values: Any) -> str:
    """A template of this folder with the values of a row and others."""
    extras = f"[{','.join(row.extras)}]" if row.extras else ""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("phi3v.plan", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template(template).render(
        name=row.run.keeping.out.name,
        nodes=row.hardware.nodes,
        num_gpus=row.hardware.num_gpus,
        minutes=_minutes(row),
        install=f"pip install --quiet {shlex.quote('.' + extras)}",
        **values,
    )


def _relocated(run: Run, data: Path | None, data_folder: str, runs_folder: str) -> Run:
    """The run with its files where a job finds them: data in `data_folder`, the run folder in `runs_folder`.

    Raises InputError for a file outside `data`.
    """
    paths = {}
    for name in ("train", "eval", "image_root") if data else ():
        for path in as_files(getattr(run.data, name)):
            assert data
            if not path.resolve().is_relative_to(data.resolve()):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {path}: it must lie in {data}, the folder that goes with the job")
            paths[name] = Path(data_folder) / path.resolve().relative_to(data.resolve())
    keeping = replace(run.keeping, out=Path(runs_folder) / run.keeping.out.name, resume="auto")
    return replace(run, data=replace(run.data, **paths), keeping=keeping)


def _minutes(row: Row) -> int:
    """The time to request: twice the planned time plus an hour, in whole hours; a day at most, or if it is unknown."""
    hours = None if row.hours_per_epoch is None else row.hours_per_epoch * row.run.optim.epochs
    return 60 * (24 if hours is None else min(24, math.ceil(2 * hours) + 1))

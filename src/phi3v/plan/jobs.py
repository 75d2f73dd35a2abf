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

import yaml

from phi3v.base.cards import Card
from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, convert
from phi3v.plan.rows import Row

FILE = Path(__file__).with_name("machines.toml")
PAGES = "https://learn.microsoft.com/azure/virtual-machines/sizes/gpu-accelerated/"
AZURE_IMAGE = "mcr.microsoft.com/azureml/openmpi5.0-cuda12.6-ubuntu24.04"
HEAD_OF_JOB = """\
# az ml job create --file THIS --resource-group GROUP --workspace-name WORKSPACE
# In a checkout of phi3v. The cluster, once:
# {cluster}
"""

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
    content = {
        "$schema": "https://azuremlschemas.azureedge.net/latest/commandJob.schema.json",
        "type": "command",
        "experiment_name": "phi3v",
        "display_name": row.run.keeping.out.name,
        "code": ".",
        "command": f"{_install(row)} && {start}",
        **({"inputs": {"data": {"type": "uri_folder", "path": str(data.resolve())}}} if data else {}),
        "outputs": {"runs": {"type": "uri_folder", "mode": "rw_mount"}},
        "environment": {
            "image": AZURE_IMAGE,
            "conda_file": {"channels": ["conda-forge"], "dependencies": ["python=3.12", "pip"]},
        },
        "compute": f"azureml:{machine.cluster}",
        # One process per node: torchrun, which starts one per GPU. Azure sets the variables of the rendezvous.
        "distribution": {"type": "pytorch", "process_count_per_instance": 1},
        "resources": {"instance_count": row.hardware.nodes, "shm_size": "64g"},
        "limits": {"timeout": 60 * _minutes(row)},
    }
    return HEAD_OF_JOB.format(cluster=create_cluster(machine, row.hardware.nodes)) + _yaml(content)


def sky_task(row: Row, data: Path | None = None) -> str:
    """A task of SkyPilot, for `sky launch FILE` in a checkout of phi3v. `data` as in `azure_job`."""
    name = row.run.keeping.out.name
    accelerator = load_catalog().skypilot.get(row.hardware.card.name, row.hardware.card.name)
    run = _relocated(row.run, data, "/data", "/runs")
    rendezvous = (
        '--node_rank=$SKYPILOT_NODE_RANK --master_addr=$(echo "$SKYPILOT_NODE_IPS" | head -n 1) --master_port=29500'
    )
    bucket = {"/runs": {"name": "phi3v-runs", "mode": "MOUNT"}}
    content = {
        "name": name,
        "num_nodes": row.hardware.nodes,
        "resources": {"accelerators": f"{accelerator}:{row.hardware.num_gpus}", "disk_size": 256},
        "workdir": ".",
        "file_mounts": bucket if data is None else {**bucket, "/data": str(data)},
        "setup": _install(row),
        "run": row.command_for(run, rendezvous),
    }
    head = "# sky launch THIS    (in a checkout of phi3v; the bucket phi3v-runs holds the run folder)\n"
    return head + _yaml(content)


def slurm_script(row: Row) -> str:
    """A batch script for SLURM's `sbatch`. If its time ends before the run does, it queues itself again."""
    minutes, hardware, out = _minutes(row), row.hardware, row.run.keeping.out
    run = replace(row.run, keeping=replace(row.run.keeping, max_minutes=minutes - SPARE_MINUTES, resume="auto"))
    rendezvous = '--rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$MASTER_ADDR:29500"'
    return f"""\
#!/bin/bash
#SBATCH --job-name={out.name}
#SBATCH --nodes={hardware.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={hardware.num_gpus}
#SBATCH --cpus-per-task={8 * hardware.num_gpus}
#SBATCH --time={minutes // 60:02}:{minutes % 60:02}:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

# Checkout, environment, data and --out must lie on a file system that all nodes share.
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun {row.command_for(run, rendezvous)}

# --max-minutes ends the run in time, with a checkpoint; an unfinished run continues in a new job.
test -e {shlex.quote(str(out / "metrics.json"))} || scontrol requeue "$SLURM_JOB_ID"
"""


def _relocated(run: Run, data: Path | None, data_folder: str, runs_folder: str) -> Run:
    """The run with its files where a job finds them: data in `data_folder`, the run folder in `runs_folder`.

    Raises InputError for a file outside `data`.
    """
    paths = {}
    for name in ("train", "eval", "image_root"):
        if data is not None and (path := getattr(run.data, name)) is not None:
            if not path.resolve().is_relative_to(data.resolve()):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {path}: it must lie in {data}, the folder that goes with the job")
            paths[name] = Path(data_folder) / path.resolve().relative_to(data.resolve())
    keeping = replace(run.keeping, out=Path(runs_folder) / run.keeping.out.name, resume="auto")
    return replace(run, data=replace(run.data, **paths), keeping=keeping)


def _install(row: Row) -> str:
    """The command that installs phi3v from the checkout that a job runs in."""
    return f"pip install --quiet '.[{','.join(row.extras)}]'" if row.extras else "pip install --quiet ."


def _minutes(row: Row) -> int:
    """The time to request: twice the planned time plus an hour, in whole hours; a day at most, or if it is unknown."""
    hours = None if row.hours_per_epoch is None else row.hours_per_epoch * row.run.optim.epochs
    return 60 * (24 if hours is None else min(24, math.ceil(2 * hours) + 1))


def _yaml(content: dict[str, Any]) -> str:
    return str(yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True))

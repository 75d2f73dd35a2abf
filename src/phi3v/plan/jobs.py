"""Where a planned run goes: Azure's GPU machines with the quota they need, and job files for Azure ML, SkyPilot, SLURM.

A job file holds the planned command and what surrounds it. Every one installs phi3v once a node and starts torchrun
itself, so that the command that runs is the command that was planned. Nothing here talks to a service.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from phi3v.base.cards import Card
from phi3v.base.errors import InputError

NVLINK = "NVLink within"


class Machine(NamedTuple):
    """A size of Azure's virtual machines."""

    size: str
    series: str
    card: str
    gpus: int
    vcpus: int
    memory_gib: int
    interconnect: str
    """Of its GPUs, within it and to others."""
    family: str
    """Name of its quota, which is counted in vCPUs."""
    page: str
    """Of its documentation, under learn.microsoft.com/azure/virtual-machines/sizes/gpu-accelerated/."""
    note: str = ""


_OLD = "an old machine: see whether your region still has it"
_RETIRED = "Azure announced its retirement for 30 September 2025: see whether your region still has it"
_A100, _A100M = "Standard NDASv4_A100 Family", "standard NDAMSv4_A100Family"
_NC_A100, _NC_H100 = "StandardNCADSA100v4Family", "StandardNCadsH100v5Family"
_T4, _A10 = "Standard NCASv3_T4 Family", "StandardNVADSA10v5Family"
_HDR, _NDR = f"{NVLINK}, InfiniBand 8 x 200 Gb/s between", f"{NVLINK}, InfiniBand 8 x 400 Gb/s between"

# From Microsoft's pages of the sizes; families as `az vm list-usage` and the Quotas page name them.
# fmt: off
MACHINES = (
    Machine("Standard_ND96isr_H200_v5", "ND H200 v5", "H200", 8, 96, 1850, _NDR, "standardNDISRH200V5Family", "nd-h200-v5-series"),  # noqa: E501
    Machine("Standard_ND96isr_H100_v5", "ND H100 v5", "H100", 8, 96, 1900, _NDR, "standardNDSH100v5Family", "ndh100v5-series"),  # noqa: E501
    Machine("Standard_ND96amsr_A100_v4", "NDm A100 v4", "A100-80GB", 8, 96, 1900, _HDR, _A100M, "ndma100v4-series"),
    Machine("Standard_ND96asr_v4", "ND A100 v4", "A100-40GB", 8, 96, 900, _HDR, _A100, "ndasra100v4-series"),
    Machine("Standard_ND40rs_v2", "NDv2", "V100-32GB", 8, 40, 672, f"{NVLINK}, InfiniBand 100 Gb/s between", "standardNDSv2Family", "ndv2-series", _OLD),  # noqa: E501
    Machine("Standard_NC40ads_H100_v5", "NCads H100 v5", "H100-NVL", 1, 40, 320, "Ethernet", _NC_H100, "ncadsh100v5-series"),  # noqa: E501
    Machine("Standard_NC80adis_H100_v5", "NCads H100 v5", "H100-NVL", 2, 80, 640, f"{NVLINK}, Ethernet between", _NC_H100, "ncadsh100v5-series"),  # noqa: E501
    Machine("Standard_NC24ads_A100_v4", "NC A100 v4", "A100-80GB", 1, 24, 220, "Ethernet", _NC_A100, "nca100v4-series"),
    Machine("Standard_NC48ads_A100_v4", "NC A100 v4", "A100-80GB", 2, 48, 440, f"{NVLINK}, Ethernet between", _NC_A100, "nca100v4-series"),  # noqa: E501
    Machine("Standard_NC96ads_A100_v4", "NC A100 v4", "A100-80GB", 4, 96, 880, f"{NVLINK} pairs, Ethernet between", _NC_A100, "nca100v4-series"),  # noqa: E501
    Machine("Standard_NC6s_v3", "NCv3", "V100-16GB", 1, 6, 112, "Ethernet", "standardNCSv3Family", "ncv3-series", _RETIRED),  # noqa: E501
    Machine("Standard_NC24rs_v3", "NCv3", "V100-16GB", 4, 24, 448, "PCIe within, InfiniBand between", "standardNCSv3Family", "ncv3-series", _RETIRED),  # noqa: E501
    Machine("Standard_NC4as_T4_v3", "NCasT4_v3", "T4", 1, 4, 28, "Ethernet", _T4, "ncast4v3-series"),
    Machine("Standard_NC64as_T4_v3", "NCasT4_v3", "T4", 4, 64, 440, "PCIe within, Ethernet between", _T4, "ncast4v3-series"),  # noqa: E501
    Machine("Standard_NV36ads_A10_v5", "NVadsA10 v5", "A10", 1, 36, 440, "Ethernet", _A10, "nvadsa10v5-series"),
    Machine("Standard_NV72ads_A10_v5", "NVadsA10 v5", "A10", 2, 72, 880, "PCIe within, Ethernet between", _A10, "nvadsa10v5-series"),  # noqa: E501
)
# fmt: on

PAGES = "https://learn.microsoft.com/azure/virtual-machines/sizes/gpu-accelerated/"
AZURE_IMAGE = "mcr.microsoft.com/azureml/openmpi5.0-cuda12.6-ubuntu24.04"
SKY_CARDS = {"H100-PCIe": "H100", "H100-NVL": "H100", "A100-40GB": "A100", "A6000": "RTXA6000", "RTX-6000-Ada": "RTX6000-Ada"}  # fmt: skip  # noqa: E501
"""Names that SkyPilot has for cards, where they are not ours; consumer cards begin with RTX there."""


def find_machine(card: Card, num_gpus: int | None) -> Machine:
    """The machine with these GPUs; the largest, if their number is not given. Raises InputError, naming what there is.

    Of two alike, one that is made for several nodes.
    """
    fitting = [machine for machine in MACHINES if machine.card == card.name]
    if not fitting:
        there = ", ".join(dict.fromkeys(machine.card for machine in MACHINES))
        raise InputError(f"--azure: no machine has a {card.name}; --gpu can be {there}")
    wanted = max(machine.gpus for machine in fitting) if num_gpus is None else num_gpus
    found = next((machine for machine in fitting if machine.gpus == wanted), None)
    if found is None:
        sizes = ", ".join(f"{machine.gpus} ({machine.size})" for machine in sorted(fitting, key=lambda m: m.gpus))
        raise InputError(f"--num-gpus {wanted}: Azure's machines with {card.name} have {sizes}")
    return found


@dataclass(frozen=True, kw_only=True)
class Job:
    """A planned run on its way to other machines."""

    name: str
    """What it is called there."""
    words: tuple[str, ...]
    """`phi3v train` and its flags."""
    card: Card
    num_gpus: int
    """A node."""
    nodes: int
    extras: tuple[str, ...]
    """Of the package, that the run needs."""
    hours: float
    """That it is expected to take."""
    out: Path
    """The run folder."""
    data: Path | None = None
    """Folder of the data, if it is the user's own and lies here."""

    @property
    def install(self) -> str:
        """From the checkout the job runs in."""
        return f"pip install --quiet '.[{','.join(self.extras)}]'" if self.extras else "pip install --quiet ."


def command(words: Sequence[str], num_gpus: int = 1, nodes: int = 1, rendezvous: str = "") -> str:
    """The words as a shell takes them, started by torchrun where there are several GPUs.

    `rendezvous` says how nodes find each other. By default by variables of the guide: NODE_RANK and MASTER_ADDR.
    """
    if num_gpus == nodes == 1:
        return shlex.join(words)
    if nodes > 1 and not rendezvous:
        rendezvous = "--node_rank=$NODE_RANK --master_addr=$MASTER_ADDR --master_port=29500"
    several = f" --nnodes={nodes} {rendezvous}" if nodes > 1 else ""
    return f"torchrun --nproc_per_node={num_gpus}{several} -m {shlex.join(words)}"


def _replaced(words: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """With other values for some flags; those that are missing come last."""
    found, missing = list(words), dict(values)
    for at, word in enumerate(words):
        if word in missing:
            found[at + 1] = missing.pop(word)
    return [*found, *(word for pair in missing.items() for word in pair)]


def _with_placeholders(text: str) -> str:
    """A shell's command in which Azure ML can see its placeholders: in double quotes, not in single ones."""
    return re.sub(r"'(\$\{\{[^']+)'", r'"\1"', text)


# -- Azure -----------------------------------------------------------------------------------------------------------


def quota(machine: Machine, nodes: int) -> str:
    """What to ask for, in a sentence."""
    return (
        f'{nodes * machine.vcpus} vCPUs of "{machine.family}" ({nodes} x {machine.size}), on the Quotas page of the '
        "portal under Machine learning, in the region of your workspace"
    )


def azure_job(job: Job, machine: Machine) -> str:
    """A command job for Azure ML: `az ml job create --file FILE`, in the folder of a checkout of phi3v."""
    values = {"--out": f"${{{{outputs.runs}}}}/{job.name}", "--resume": "auto"}
    inputs = {}
    if job.data is not None:
        given = dict(zip(job.words, job.words[1:], strict=False))
        inputs["data"] = {"type": "uri_folder", "path": str(job.data.resolve())}
        for flag in ("--train", "--eval", "--image-root"):
            if flag in given:
                relative = _inside(Path(given[flag]), job.data, flag)
                values[flag] = "${{inputs.data}}" if relative == "." else f"${{{{inputs.data}}}}/{relative}"
    rendezvous = "--node_rank=$NODE_RANK --master_addr=$MASTER_ADDR --master_port=$MASTER_PORT"
    words = _replaced(job.words, values)
    start = _with_placeholders(command(words, job.num_gpus, job.nodes, rendezvous))
    content: dict[str, Any] = {
        "$schema": "https://azuremlschemas.azureedge.net/latest/commandJob.schema.json",
        "type": "command",
        "experiment_name": "phi3v",
        "display_name": job.name,
        "code": ".",
        "command": f"{job.install} && {start}",
        **({"inputs": inputs} if inputs else {}),
        "outputs": {"runs": {"type": "uri_folder", "mode": "rw_mount"}},
        "environment": {
            "image": AZURE_IMAGE,
            "conda_file": {"channels": ["conda-forge"], "dependencies": ["python=3.12", "pip"]},
        },
        "compute": f"azureml:{compute_name(machine)}",
        # One process a node, which is torchrun: it starts one for every GPU. Azure says where the nodes are.
        "distribution": {"type": "pytorch", "process_count_per_instance": 1},
        "resources": {"instance_count": job.nodes, "shm_size": "64g"},
        "limits": {"timeout": 60 * _minutes(job.hours)},
    }
    head = (
        f"# az ml job create --file THIS --resource-group GROUP --workspace-name WORKSPACE\n"
        f"# In a checkout of phi3v. The cluster, once:\n# {create_cluster(machine, job.nodes)}\n"
    )
    return head + _yaml(content)


def create_cluster(machine: Machine, nodes: int) -> str:
    """The command that makes the cluster a job names. It costs nothing while no job runs."""
    return (
        f"az ml compute create --type AmlCompute --name {compute_name(machine)} --size {machine.size} "
        f"--min-instances 0 --max-instances {nodes} --resource-group GROUP --workspace-name WORKSPACE"
    )


def compute_name(machine: Machine) -> str:
    """At most 24 letters, digits and hyphens, as Azure ML has it."""
    return machine.size.removeprefix("Standard_").replace("_", "-").lower()[:24].rstrip("-")


def _inside(path: Path, folder: Path, flag: str) -> str:
    try:
        return str(path.resolve().relative_to(folder.resolve()))
    except ValueError:
        raise InputError(f"{flag} {path}: it must lie in {folder}, the folder that goes with the job") from None


# -- SkyPilot, SLURM -------------------------------------------------------------------------------------------------


def sky_task(job: Job) -> str:
    """A task for SkyPilot: `sky launch FILE`, in the folder of a checkout of phi3v."""
    rendezvous = (
        '--node_rank=$SKYPILOT_NODE_RANK --master_addr=$(echo "$SKYPILOT_NODE_IPS" | head -n 1) --master_port=29500'
    )
    values, mounts = {"--resume": "auto", "--out": f"/runs/{job.name}"}, dict[str, Any]()
    mounts["/runs"] = {"name": "phi3v-runs", "mode": "MOUNT"}
    if job.data is not None:
        given = dict(zip(job.words, job.words[1:], strict=False))
        mounts["/data"] = str(job.data)
        for flag in ("--train", "--eval", "--image-root"):
            if flag in given:
                values[flag] = str(Path("/data") / _inside(Path(given[flag]), job.data, flag))
    start = command(_replaced(job.words, values), job.num_gpus, job.nodes, rendezvous)
    name = SKY_CARDS.get(job.card.name, f"RTX{job.card.name}" if job.card.name.isdecimal() else job.card.name)
    name = name.removesuffix("-16GB") if name.startswith("V100") else name
    content = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": {"accelerators": f"{name}:{job.num_gpus}", "disk_size": 256},
        "workdir": ".",
        "file_mounts": mounts,
        "setup": job.install,
        "run": start,
    }
    return "# sky launch THIS    (in a checkout of phi3v; phi3v-runs is the bucket the run is kept in)\n" + _yaml(
        content
    )


def slurm_script(job: Job) -> str:
    """A batch script for SLURM: `sbatch FILE`. Where its time ends before the run does, it queues itself again."""
    minutes = _minutes(job.hours)
    rendezvous = (
        '--rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$MASTER_ADDR:29500"' if job.nodes > 1 else ""
    )
    values = {"--max-minutes": str(minutes - SPARE_MINUTES), "--resume": "auto"}
    start = command(_replaced(job.words, values), job.num_gpus, job.nodes, rendezvous)
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={job.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={job.num_gpus}",
        f"#SBATCH --cpus-per-task={8 * job.num_gpus}",
        f"#SBATCH --time={minutes // 60:02}:{minutes % 60:02}:00",
        "#SBATCH --requeue",
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --open-mode=append",
        "",
        "# The same checkout, environment, data and --out on every node: a file system that all of them see.",
        "set -euo pipefail",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "",
        f"srun {start}",
        "",
        "# --max-minutes ends the run in time, with a checkpoint; what is not finished goes on in a job of its own.",
        f'test -e {shlex.quote(str(job.out / "metrics.json"))} || scontrol requeue "$SLURM_JOB_ID"',
    ]
    return "\n".join(lines) + "\n"


SPARE_MINUTES = 15
"""Of a job's time that the run leaves for loading, its last step and a checkpoint."""


def _minutes(hours: float) -> int:
    """Time to ask for: twice what is expected and an hour, in whole hours, at most a day."""
    return 60 * min(24, math.ceil(2 * hours) + 1)


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True)

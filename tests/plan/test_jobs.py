"""Job files: what Azure ML, SkyPilot and SLURM would start is the planned command, and the files are well-formed."""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from phi3v.base.cards import find_card, load_cards
from phi3v.base.config import Data, Keeping, Run, Tuning
from phi3v.base.errors import InputError
from phi3v.cli import main
from phi3v.plan.devices import Hardware
from phi3v.plan.jobs import azure_job, create_cluster, find_machine, load_catalog, quota, sky_task, slurm_script
from phi3v.plan.rows import Row, Start, shell_command

A100 = find_card("A100-80GB")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "my data"
    folder.mkdir()
    return folder


@pytest.fixture
def row(data: Path) -> Row:
    """A run on the user's own data, on two nodes of eight GPUs, for 3.2 hours."""
    row = Row(
        mode="lora",
        run=Run(
            data=Data(train=data / "train.jsonl", eval=data / "val.jsonl"),
            tuning=Tuning(lora=True),
            keeping=Keeping(out=Path("a/b")),
        ),
        start=Start(("phi3v", "train"), Run()),
        hardware=Hardware(card=A100, num_gpus=8, nodes=2),
        engine="zero2",
        recomputed_layers=0,
        num_layers=55,
        memory_gb={"total": 10.0},
        flops_per_example=1e13,
        computed_flops_per_example=1e13,
        examples_per_epoch=1,
    )
    assert row.examples_per_s is not None
    return replace(row, examples_per_epoch=3.2 * 3600 * row.examples_per_s)


def on(row: Row, nodes: int, num_gpus: int, card: str = "A100-80GB") -> Row:
    return replace(row, hardware=Hardware(card=find_card(card), num_gpus=num_gpus, nodes=nodes))


# -- the machines ----------------------------------------------------------------------------------------------------


def test_machines_have_cards_of_the_table() -> None:
    names, machines = {card.name for card in load_cards()}, load_catalog().azure
    assert all(machine.card in names for machine in machines)
    assert load_catalog().skypilot.keys() <= names
    assert len({machine.size for machine in machines}) == len(machines)
    assert len({(machine.card, machine.gpus) for machine in machines}) == len(machines)
    assert len({machine.cluster for machine in machines}) == len(machines)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{1,23}", machine.cluster) for machine in machines)


@pytest.mark.parametrize(
    ("card", "num_gpus", "size"),
    [
        ("A100-80GB", None, "Standard_ND96amsr_A100_v4"),
        ("A100-80GB", 1, "Standard_NC24ads_A100_v4"),
        ("A100-40GB", 8, "Standard_ND96asr_v4"),
        ("H100", 8, "Standard_ND96isr_H100_v5"),
        ("H200", None, "Standard_ND96isr_H200_v5"),
        ("V100-32GB", None, "Standard_ND40rs_v2"),
        ("T4", 1, "Standard_NC4as_T4_v3"),
        ("A10", 2, "Standard_NV72ads_A10_v5"),
    ],
)
def test_the_machine_with_these_cards(card: str, num_gpus: int | None, size: str) -> None:
    assert find_machine(find_card(card), num_gpus).size == size


def test_a_machine_that_there_is_not() -> None:
    with pytest.raises(InputError, match=r"--num-gpus 3: Azure's machines with A100-80GB have 1 \(Standard_NC24ads"):
        find_machine(A100, 3)
    with pytest.raises(InputError, match="no machine has a 3090"):
        find_machine(find_card("3090"), None)


def test_the_quota_is_counted_in_virtual_cores_of_a_family() -> None:
    machine = find_machine(A100, 8)
    assert quota(machine, 2).startswith('192 vCPUs of "standard NDAMSv4_A100Family" (2 x Standard_ND96amsr_A100_v4)')
    assert "--size Standard_ND96amsr_A100_v4" in create_cluster(machine, 2)
    assert "--max-instances 2" in create_cluster(machine, 2)


# -- the command -----------------------------------------------------------------------------------------------------


def test_one_gpu_needs_no_torchrun() -> None:
    assert shell_command(["phi3v", "train", "--out", "a b"]) == "phi3v train --out 'a b'"
    assert shell_command(["phi3v", "train"], 4) == "torchrun --nproc_per_node=4 -m phi3v train"
    several = shell_command(["phi3v", "train"], 4, 2)
    assert "--nnodes=2 --node_rank=$NODE_RANK --master_addr=$MASTER_ADDR" in several


# -- Azure -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # azure-ai-ml's own
def test_azure_ml_loads_the_job_and_finds_nothing_wrong(row: Row, data: Path, tmp_path: Path) -> None:
    logging.getLogger("azure").setLevel(logging.CRITICAL)
    azure = pytest.importorskip("azure.ai.ml", reason="azure-ai-ml is not installed")
    for nodes, num_gpus, folder in ((2, 8, data), (1, 8, None), (1, 1, data)):
        file, machine = tmp_path / f"{nodes}-{num_gpus}.yml", find_machine(A100, num_gpus)
        file.write_text(azure_job(on(row, nodes, num_gpus), machine, folder))
        loaded: Any = azure.load_job(file)
        checked = loaded._validate()
        assert checked.passed, checked.error_messages
        assert loaded.resources.instance_count == nodes
        assert loaded.distribution.process_count_per_instance == 1
        assert loaded.compute == machine.cluster


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # azure-ai-ml's own
def test_azure_ml_would_find_a_mistake(row: Row, tmp_path: Path) -> None:
    """So that the test above is known to be able to fail."""
    azure = pytest.importorskip("azure.ai.ml", reason="azure-ai-ml is not installed")
    file = tmp_path / "job.yml"
    file.write_text(azure_job(row, find_machine(A100, 8)).replace("instance_count: 2", "instance_count: two"))
    with pytest.raises(Exception, match="instance_count"):
        azure.load_job(file)


def test_azures_job_runs_the_planned_command_with_its_own_paths(row: Row, data: Path) -> None:
    content = yaml.safe_load(azure_job(row, find_machine(A100, 8), data))
    install, _, start = content["command"].partition(" && ")
    assert install == "pip install --quiet '.[deepspeed]'"
    assert start.startswith("torchrun --nproc_per_node=8 --nnodes=2 --node_rank=$NODE_RANK --master_addr=$MASTER_ADDR")
    assert '--train "${{inputs.data}}/train.jsonl" --eval "${{inputs.data}}/val.jsonl" --lora' in start
    assert '--out "${{outputs.runs}}/b" --resume auto' in start
    assert content["inputs"]["data"]["path"] == str(data)
    assert content["limits"]["timeout"] == 8 * 3600


def test_data_outside_the_folder_is_refused(row: Row, data: Path) -> None:
    outside = replace(row.run, data=replace(row.run.data, eval=data / "../other.jsonl"))
    with pytest.raises(InputError, match="--eval"):
        azure_job(replace(row, run=outside), find_machine(A100, 8), data)


# -- SkyPilot --------------------------------------------------------------------------------------------------------


def test_skypilot_takes_the_task(row: Row, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # it makes a folder there
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed: pip install skypilot")
    file = tmp_path / "task.yaml"
    file.write_text(sky_task(row, data))
    task = sky.Task.from_yaml(str(file))
    assert task.num_nodes == 2


SKY_KEYS = {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}


def test_skypilots_task_has_its_keys_and_the_planned_command(row: Row, data: Path) -> None:
    content = yaml.safe_load(sky_task(row, data))
    assert content.keys() == SKY_KEYS
    assert content["resources"]["accelerators"] == "A100-80GB:8"
    assert content["file_mounts"]["/data"] == str(data)
    start = content["run"]
    assert "--nnodes=2 --node_rank=$SKYPILOT_NODE_RANK" in start
    assert "--train /data/train.jsonl --eval /data/val.jsonl --lora --out /runs/b --resume auto" in start
    assert subprocess.run(["bash", "-n"], input=start, text=True, check=False).returncode == 0


@pytest.mark.parametrize(("card", "name"), [("4090", "RTX4090"), ("V100-32GB", "V100-32GB"), ("V100-16GB", "V100")])
def test_skypilots_own_names_of_cards(card: str, name: str, row: Row) -> None:
    content = yaml.safe_load(sky_task(on(row, 2, 8, card)))
    assert content["resources"]["accelerators"] == f"{name}:8"


# -- SLURM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "num_gpus"), [(1, 1), (1, 8), (2, 8)])
def test_the_batch_script_is_a_script(nodes: int, num_gpus: int, row: Row, tmp_path: Path) -> None:
    file = tmp_path / "train.sbatch"
    hours = replace(row, examples_per_epoch=row.examples_per_epoch * nodes * num_gpus / 16)
    file.write_text(slurm_script(on(hours, nodes, num_gpus)))
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    lines = file.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert f"#SBATCH --nodes={nodes}" in lines
    assert f"#SBATCH --gpus-per-node={num_gpus}" in lines
    assert "#SBATCH --time=08:00:00" in lines
    start = next(line for line in lines if line.startswith("srun "))
    assert ("torchrun" in start) == (nodes * num_gpus > 1)
    assert ('--rdzv_endpoint="$MASTER_ADDR:29500"' in start) == (nodes > 1)
    assert "--resume auto --max-minutes 465" in start


def test_the_batch_script_starts_the_command_and_queues_itself_until_done(row: Row, tmp_path: Path) -> None:
    """Run with stand-ins for SLURM's commands: every node's torchrun gets what it needs, and an unfinished run is
    queued again, a finished one not."""
    commands = tmp_path / "bin"
    commands.mkdir()
    said = tmp_path / "said"
    (commands / "scontrol").write_text(
        f'#!/bin/bash\n[ "$1" = show ] && echo node1 && echo node2\necho "$*" >> {said}\n'
    )
    (commands / "srun").write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> {said}\n')
    for file in commands.iterdir():
        file.chmod(0o755)
    script = tmp_path / "train.sbatch"
    run = replace(row.run, keeping=replace(row.run.keeping, out=tmp_path / "run"))
    script.write_text(slurm_script(replace(row, run=run)))
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7"}

    def lines() -> list[str]:
        said.unlink(missing_ok=True)
        subprocess.run(["bash", str(script)], check=True, env=environment, cwd=tmp_path)
        return said.read_text().splitlines()

    *_, started, last = lines()
    assert "--rdzv_endpoint=node1:29500" in started
    assert "--rdzv_id=7" in started
    assert last == "requeue 7"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").touch()
    assert not any("requeue" in line for line in lines())


# -- from the command line -------------------------------------------------------------------------------------------


def test_the_plan_writes_all_three(tmp_path: Path, capsys: Any) -> None:
    files = {kind: tmp_path / kind for kind in ("azure", "skypilot", "slurm")}
    words = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    given = ["plan", "hateful-memes", "--gpu", "A100-80GB", "--nodes", "2", "--mode", "lora", *words]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "Standard_ND96amsr_A100_v4 (NDm A100 v4)" in said
    assert "192 vCPUs" in said
    for kind, file in files.items():
        text = file.read_text()
        assert kind == "slurm" or "pip install --quiet '.[hub]'" in text  # the recipe's data is parquet
        assert "-m phi3v train hateful-memes --mode lora" in text
        assert str(file) in said
    assert yaml.safe_load(files["azure"].read_text())["outputs"]["runs"]["mode"] == "rw_mount"
    assert shlex.split(files["slurm"].read_text().splitlines()[-1])[-2:] == ["requeue", "$SLURM_JOB_ID"]


def test_one_of_azures_old_machines_comes_with_a_note(tmp_path: Path, capsys: Any) -> None:
    given = ["plan", "hateful-memes", "--gpu", "V100-32GB", "--mode", "lora", "--azure", str(tmp_path / "job.yml")]
    assert main(given) == 0
    assert "an old machine" in capsys.readouterr().out

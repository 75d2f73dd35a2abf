"""Each tracker keeps what the log says, read back with its own means; a resumed run goes on in the same tracked run."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from phi3v.base.errors import InputError
from phi3v.base.runfolder import RunFolder
from phi3v.train import trackers as room
from phi3v.train.trackers import start_trackers

SETTINGS = {"optim": {"learning_rate": 0.003, "max_steps": None}, "tuning": {"lora": True, "freeze": ("vision",)}}
FLAT = {"optim/learning_rate": 0.003, "optim/max_steps": "None", "tuning/lora": True, "tuning/freeze": "('vision',)"}

# Two steps and an evaluation, and after a checkpoint at step 1 the second step again and a third.
FIRST = [(1, {"loss": 0.5}), (2, {"loss": 0.25}), (2, {"eval/accuracy": 0.75})]
AGAIN = [(2, {"loss": 0.25}), (3, {"loss": 0.125})]


@pytest.fixture(autouse=True)
def nobody_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the user's, and nobody logged in anywhere."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/netrc"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install 'phi3v[track]'")


def tell(name: str, folder: Path, first_step: int, entries: list[Any], *, failed: bool = False) -> str:
    """What a run does with a tracker; gives what it says of where to look."""
    folder.mkdir(exist_ok=True)
    (tracker,) = start_trackers([name], RunFolder(folder), SETTINGS, first_step)
    for step, numbers in entries:
        tracker.log(numbers, step)
    tracker.finish(failed=failed)
    return tracker.where


# -- tensorboard -----------------------------------------------------------------------------------------------------


@needs("tensorboard")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    where = tell("tensorboard", tmp_path / "run", 0, FIRST)
    assert where == f"tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}"
    tell("tensorboard", tmp_path / "run", 1, AGAIN)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    # What is said twice is withdrawn the first time, evaluations included.
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert events.Scalars("eval/accuracy") == []
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    kept = HParamsPluginData.FromString(content).session_start_info.hparams
    read = {key: getattr(value, value.WhichOneof("kind")) for key, value in kept.items()}
    assert read == FLAT


# -- wandb -----------------------------------------------------------------------------------------------------------


def records_of(folder: Path) -> list[Any]:
    """The records in the file of an offline run: a log in LevelDB's format, of wandb's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    content, at, found, part = file.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # no header fits into the rest of a block
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(part))
            part = b""
    return found


def wandb_run(folder: Path) -> dict[str, Any]:
    records = records_of(folder)
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    settings = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    settings |= {item.key: json.loads(item.value_json) for item in run.config.update}
    history = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            history.append({key: value for key, value in items.items() if not key.startswith("_")})
    exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    return {"run": run, "settings": settings, "history": history, "exit": exits}


@needs("wandb")
def test_wandb_without_a_login_is_offline_and_says_so(tmp_path: Path) -> None:
    import wandb

    where = tell("wandb", tmp_path / "mine", 0, FIRST)
    kept = tmp_path / "mine/wandb"
    assert where == f"not logged in, kept in {kept}; wandb sync {kept}/offline-run-* sends it"
    tell("wandb", tmp_path / "mine", 1, AGAIN, failed=True)
    wandb.teardown()  # its service has written all
    first, again = (wandb_run(folder) for folder in sorted(kept.glob("offline-run-*")))
    assert first["run"].run_id == again["run"].run_id
    assert (first["run"].project, first["run"].display_name) == ("phi3v", "mine")
    assert first["settings"].items() >= FLAT.items()
    assert first["history"] == [{**numbers, "step": step} for step, numbers in FIRST]
    assert again["history"] == [{**numbers, "step": step} for step, numbers in AGAIN]
    assert (first["exit"], again["exit"]) == ([0], [1])


@needs("wandb")
def test_wandb_does_as_its_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    wandb.teardown()  # it reads its environment once
    try:
        where = tell("wandb", tmp_path / "run", 0, FIRST)
    finally:
        wandb.teardown()
    assert where.startswith("kept in ")
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert wandb_run(folder)["run"].project == "theirs"


# -- mlflow ----------------------------------------------------------------------------------------------------------


@needs("mlflow")
@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")  # mlflow's use of SQLAlchemy
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    where = tell("mlflow", tmp_path / "run", 0, FIRST, failed=True)
    uri = f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"
    assert where == f"mlflow ui --backend-store-uri {uri}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("phi3v")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FAILED")
    tell("mlflow", tmp_path / "run", 1, AGAIN)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {key: str(value) for key, value in FLAT.items()}
    history = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss"))
    assert history == [(1, 0.5), (2, 0.25), (2, 0.25), (3, 0.125)]
    assert run.data.metrics["eval/accuracy"] == 0.75

    # Where its environment says: that data base, since a new one takes seconds to make.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    assert tell("mlflow", tmp_path / "other", 0, FIRST) == uri
    assert not (tmp_path / "other/mlflow.db").exists()
    (run,) = client.search_runs([client.get_experiment_by_name("theirs").experiment_id])
    assert (run.info.run_name, run.data.metrics["loss"]) == ("other", 0.25)


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("No module named 'that'"), "No module named 'that'"),
        (ConnectionError("no route to host\nTraceback"), "no route to host"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_names_the_flag(error: Exception, message: str, tmp_path: Path, monkeypatch) -> None:
    def broken(*unused: Any) -> None:
        raise error

    monkeypatch.setitem(room.TRACKERS, "wandb", broken)
    with pytest.raises(InputError) as caught:
        start_trackers(["wandb"], RunFolder(tmp_path), SETTINGS, 0)
    assert str(caught.value) == f"--track wandb: {message}"


def test_each_name_of_the_flag_is_a_tracker() -> None:
    import typing

    from phi3v.base.config import Keeping

    (names,) = {typing.get_args(kind) for kind in typing.get_args(typing.get_type_hints(Keeping)["track"])} - {()}
    assert set(names) == set(room.TRACKERS)

"""Trackers that receive the numbers of `log.jsonl` too: TensorBoard, Weights & Biases, MLflow.

Each keeps a run under the name of its folder, and in that folder, unless the user's environment names another place: no
network is used unasked. A resumed run continues the tracked run that it began, whose id is in `trackers.json`.

accelerate's trackers do not replace these: MLflow's ends a failed run as finished, TensorBoard's puts the settings into
a run of their own, wandb's counts steps that cannot go back, and each needs the same code to find its run again.
"""

from __future__ import annotations

import logging
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phi3v.base.errors import InputError
from phi3v.base.runfolder import RunFolder
from phi3v.model.loading import first_line

PROJECT = "phi3v"


class Tracker(ABC):
    """Starts or continues a tracked run; `settings` are the run's, flat, and it resumes after `first_step`."""

    name: str
    where: str
    """How to look at it."""

    def __init__(self, folder: RunFolder, settings: dict[str, Any], first_step: int) -> None:
        self.folder, self.title = folder, folder.path.resolve().name
        self.start(settings, first_step)

    @abstractmethod
    def start(self, settings: dict[str, Any], first_step: int) -> None: ...

    @abstractmethod
    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Keeps the numbers of a line of the log."""

    @abstractmethod
    def finish(self, *, failed: bool) -> None:
        """The run has ended, or has been stopped."""

    def tracked_id(self, new: Callable[[], str]) -> str:
        """The id of the tracked run: the one in trackers.json, or a new one that is put there."""
        known = self.folder.trackers
        if self.name not in known:
            known[self.name] = new()
            self.folder.save(trackers=known)
        return known[self.name]


class TensorBoard(Tracker):
    """Event files in `tensorboard/`. A resumed run withdraws what it will write again."""

    name = "tensorboard"

    def start(self, settings: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        target = self.folder.path / "tensorboard"
        self.where = f"tensorboard --logdir {target}"
        self.writer = SummaryWriter(str(target), purge_step=first_step + 1 if first_step else 0)
        assert self.writer.file_writer is not None
        for summary in hparams(settings, {}):  # the writer's own add_hparams would make a run of its own of them
            self.writer.file_writer.add_summary(summary)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def finish(self, *, failed: bool) -> None:
        self.writer.close()


class Wandb(Tracker):
    """As the user's environment says (WANDB_MODE, WANDB_PROJECT, ...), and offline where nobody is logged in."""

    name = "wandb"

    def start(self, settings: dict[str, Any], first_step: int) -> None:
        import wandb

        mode = wandb.setup().settings.mode
        # Where nobody is logged in wandb.init would ask for a key, and wait.
        alone = mode == "online" and not wandb.login(prompt=False, verify=False)
        offline = alone or mode == "offline"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.title,
            dir=self.folder.path,
            id=self.tracked_id(lambda: uuid.uuid4().hex[:8]),
            mode="offline" if alone else None,
            resume=None if offline else "allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run.config.update(settings, allow_val_change=True)
        # wandb's own count of steps cannot go back, as a resumed run does.
        self.run.define_metric("*", step_metric="step")
        files = self.folder.path / "wandb"
        kept = f"kept in {files}; wandb sync {files}/offline-run-* sends it"
        self.where = f"{'not logged in, ' if alone else ''}{kept}" if offline else self.run.url or mode

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log({**numbers, "step": step})

    def finish(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow(Tracker):
    """Where MLFLOW_TRACKING_URI says, else in `mlflow.db`."""

    name = "mlflow"

    def start(self, settings: dict[str, Any], first_step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        for chatty in ("alembic", "mlflow"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        own = f"sqlite:///{(self.folder.path / 'mlflow.db').resolve()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", own)
        self.where = f"mlflow ui --backend-store-uri {uri}" if uri == own else uri
        self.mlflow = mlflow
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        known = self.folder.trackers.get(self.name)
        run = mlflow.start_run(run_id=known, run_name=None if known else self.title)
        # MLflow's parameters cannot be changed: a resumed run keeps those it began with.
        if self.tracked_id(lambda: run.info.run_id) != known:
            mlflow.log_params(settings)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(numbers), step)

    def finish(self, *, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, Wandb, MLflow)}


def start_trackers(
    names: Sequence[str], folder: RunFolder, settings: Mapping[str, Mapping[str, Any]], first_step: int
) -> list[Tracker]:
    """The trackers that `--track` names, with the run's settings, flattened to `group/name`.

    Raises InputError, naming the flag, for one that cannot start.
    """
    flat = {f"{group}/{name}": value for group, values in settings.items() for name, value in values.items()}
    plain = {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in flat.items()}
    trackers: list[Tracker] = []
    for name in names:
        try:
            trackers.append(TRACKERS[name](folder, plain, first_step))
        except Exception as error:  # a library with a service of its own behind it raises anything
            raise InputError(f"--track {name}: {first_line(error)}") from error
    return trackers

"""A run folder belongs to one run: what may go on in it, what may begin, and who is kept out."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phi3v.train.loop as training
import phi3v.train.setup as setting_up
from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.base.runfolder import LOCK, RunFolder, State, digests
from phi3v.train.loop import train

MAKE = Callable[..., Run]


def claim(run: Run) -> State:
    return RunFolder(run.keeping.out).claim(run)


NEW, STARTED, FINISHED = "new", "unfinished", "finished"


@pytest.fixture
def left(settings_for: MAKE) -> Callable[..., Path]:
    """Leaves a run folder with some files in it, as a run with some flags would."""

    def leave(*names: str, **flags: Any) -> Path:
        run = settings_for(**flags)
        run.keeping.out.mkdir(parents=True, exist_ok=True)
        contents = {"config.json": run.to_dict(), "environment.json": {"data": digests(run)}}
        for name in names:
            (run.keeping.out / name).write_text(json.dumps(contents.get(name, {})))
        return run.keeping.out

    return leave


# -- what may go on, and what may begin ------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_a_new_or_empty_folder_is_anybodys_and_not_made_before_there_is_something_to_put_in_it(
    resume: str, settings_for: MAKE, left: Callable[..., Path]
) -> None:
    run = settings_for(resume=resume)
    assert claim(run) == NEW
    assert not run.keeping.out.exists()
    left()
    assert claim(run) == NEW
    left(LOCK)
    assert claim(run) == NEW, "a run that was killed before it wrote anything"


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_a_folder_of_something_else_is_nobodys(resume: str, settings_for: MAKE, left: Callable[..., Path]) -> None:
    folder = left("thesis.tex")
    with pytest.raises(InputError, match=r"--out .*run is not empty and holds no run: choose another folder"):
        claim(settings_for(resume=resume))
    with pytest.raises(InputError, match=r"--out .*thesis.tex is a file: choose another folder"):
        claim(settings_for(resume=resume, out=folder / "thesis.tex"))


def test_an_unfinished_run_goes_on_when_asked(settings_for: MAKE, left: Callable[..., Path]) -> None:
    left("config.json", "environment.json")
    assert claim(settings_for(resume="auto")) == STARTED
    with pytest.raises(InputError, match=r"holds an unfinished run: add --resume auto to continue it, or choose"):
        claim(settings_for())


def test_a_finished_run_is_found_finished_and_never_begun_again(settings_for: MAKE, left: Callable[..., Path]) -> None:
    left("config.json", "environment.json", "metrics.json")
    assert claim(settings_for(resume="auto")) == FINISHED
    with pytest.raises(InputError, match=r"holds a finished run: choose another folder"):
        claim(settings_for())
    with pytest.raises(InputError, match=r"--resume: --batch-size was 4 in .*, now it is 2"):
        claim(settings_for(resume="auto", batch_size=2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-3}, "--learning-rate was 0.003 in .*, now it is 0.001"),
        ({"batch_size": 2}, "--batch-size was 4 in .*, now it is 2"),
        ({"seed": 1}, "--seed was 42 in .*, now it is 1"),
        ({"max_steps": 20}, "--max-steps was None in .*, now it is 20"),
        ({"dtype": "bf16"}, "--dtype was fp32 in .*, now it is bf16"),
        ({"optimizer": "adamw-8bit"}, "--optimizer was adamw in .*, now it is adamw-8bit"),
        ({"lora": True}, "--lora was False in .*, now it is True"),
        ({"freeze": ("vision",)}, r"--freeze was \[\] in .*, now it is \['vision'\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_make_another_run_of_it_is_refused_by_its_flag(
    changed: dict[str, Any], message: str, settings_for: MAKE, left: Callable[..., Path]
) -> None:
    left("config.json", "environment.json")
    with pytest.raises(InputError, match=f"^--resume: {message}$"):
        claim(settings_for(resume="auto", **changed))


def test_what_surrounds_the_loop_may_change(settings_for: MAKE, left: Callable[..., Path]) -> None:
    left("config.json", "environment.json")
    free = {"parallel": "fsdp2", "rank_timeout_minutes": 1.0, "save_every_steps": 7, "keep_checkpoints": 9}
    free |= {"max_minutes": 5.0, "progress": True, "track": ("tensorboard",)}
    free |= {"on_bad_example": "skip", "num_workers": 2}
    assert claim(settings_for(resume="auto", **free)) == STARTED


def test_a_flag_that_did_not_exist_yet_counts_as_unchanged(settings_for: MAKE, left: Callable[..., Path]) -> None:
    """Runs of an older version go on."""
    file = left("config.json", "environment.json") / "config.json"
    before = json.loads(file.read_text())
    del before["data"]["on_bad_example"], before["evaluation"]["score"]
    file.write_text(json.dumps(before))
    assert claim(settings_for(resume="auto")) == STARTED


@pytest.mark.parametrize("flag", ["train", "eval"])
def test_a_run_does_not_go_on_with_other_data(
    flag: str, settings_for: MAKE, left: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(tiny_data.read_bytes())
    left("config.json", "environment.json", **{flag: copy})
    assert claim(settings_for(resume="auto", **{flag: copy})) == STARTED
    copy.write_bytes(tiny_data.read_bytes().replace(b"maybe", b"never"))
    with pytest.raises(InputError, match=rf"--resume: --{flag} .*copy\.jsonl has changed since the run began"):
        claim(settings_for(resume="auto", **{flag: copy}))


def test_what_counts_is_the_content_and_not_the_path(
    settings_for: MAKE, left: Callable[..., Path], tiny_data: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    for finished in ((), ("metrics.json",)):
        left("config.json", "environment.json", *finished, eval=tiny_data)
        shutil.copytree(tiny_model_dir, tmp_path / "elsewhere/model", dirs_exist_ok=True)
        shutil.copy(tiny_data, tmp_path / "elsewhere/data.jsonl")
        monkeypatch.chdir(tmp_path / "elsewhere")
        flags = {"model": "./model", "train": Path("data.jsonl"), "eval": Path("../elsewhere/data.jsonl")}
        flags["image_root"] = tiny_data.parent / "images"
        assert claim(settings_for(resume="auto", **flags)) == (FINISHED if finished else STARTED)
        with pytest.raises(InputError, match=r"--resume: --eval was .*train\.jsonl.* in .*, now it is \[\]$"):
            claim(settings_for(resume="auto", **flags | {"eval": None}))
        (tmp_path / "elsewhere/model/config.json").write_text("{}")
        with pytest.raises(InputError, match=r"--resume: --model ./model has changed since the run began"):
            claim(settings_for(resume="auto", **flags))


def test_a_model_of_the_hub_is_known_by_its_name(settings_for: MAKE, left: Callable[..., Path], tmp_path: Path) -> None:
    left("config.json", "environment.json", model="owner/name")
    assert claim(settings_for(resume="auto", model="owner/name")) == STARTED
    with pytest.raises(InputError, match=r"--resume: --model was owner/name in .*, now it is owner/another"):
        claim(settings_for(resume="auto", model="owner/another"))


@pytest.mark.parametrize("name", ["config.json", "environment.json"])
def test_a_file_that_no_run_writes_is_named(name: str, settings_for: MAKE, left: Callable[..., Path]) -> None:
    folder = left("config.json", "environment.json")
    (folder / name).write_text("[1")
    with pytest.raises(InputError, match=f"{name}: not "):
        claim(settings_for(resume="auto"))


# -- the lock --------------------------------------------------------------------------------------------------------


ANOTHER = """
import fcntl, sys, time
stream = open(sys.argv[1], "a+")
fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("process 7 on another", file=stream, end="", flush=True)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""
"""A process of its own: a lock does not bind its holder's."""


def is_free(folder: Path) -> bool:
    """For another process."""
    command = [sys.executable, "-c", ANOTHER, str(folder / LOCK), "0"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with RunFolder(folder).locked():
        assert not is_free(folder)
        assert (folder / LOCK).read_text().startswith(f"process {os.getpid()} on {platform.node()} since 20")
    assert is_free(folder)


def test_who_is_kept_out_is_told_by_whom_and_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ANOTHER, str(tmp_path / LOCK), "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as another:
        try:
            assert another.stdout
            assert another.stdout.readline() == "held\n"
            with pytest.raises(InputError) as caught, RunFolder(tmp_path).locked():
                pass
        finally:
            another.kill()
    assert str(caught.value) == f"--out {tmp_path}: another run is writing here (process 7 on another)"
    with RunFolder(tmp_path).locked():
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on {platform.node()} since 20")


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_a_run_that_began_while_this_one_loaded_is_not_written_over(
    resume: str, settings_for: MAKE, left: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are started; the other is faster, and has ended before this one comes to its folder."""
    build = setting_up.build_engine

    def slowly(*arguments: Any, **named: Any) -> Any:
        left("config.json", "environment.json", "log.jsonl")
        return build(*arguments, **named)

    monkeypatch.setattr(setting_up, "build_engine", slowly)
    run = settings_for(resume=resume)
    with pytest.raises(InputError, match=r"another run has begun here|holds an unfinished run"):
        train(run)
    assert (run.keeping.out / "log.jsonl").read_text() == "{}"


def test_a_run_holds_its_lock_to_its_end(settings_for: MAKE, monkeypatch: pytest.MonkeyPatch) -> None:
    run = settings_for(max_steps=1)
    free = []

    def write_report(folder: Path) -> Path:
        free.append(is_free(folder))
        return folder / "report.html"

    monkeypatch.setattr(training, "write_report", write_report)
    train(run)
    assert free == [False]
    assert is_free(run.keeping.out)


def test_a_folder_of_another_host_is_told_by_its_lock(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with RunFolder(tmp_path / "there").locked() as holder:
        RunFolder(tmp_path / "there").check_shared(holder, wait_s=0)
        for folder in ("here", "nowhere"):
            with pytest.raises(InputError, match="it must be on a file system that all of them share"):
                RunFolder(tmp_path / folder).check_shared(holder, wait_s=0)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_what_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert not run.is_run
    assert not run.is_finished
    assert run.settings == run.environment == run.metrics == run.lengths == run.published == run.images == {}
    assert run.warnings == []
    assert run.log == run.predictions == []


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log_file.write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    assert run.log == [{"kind": "step", "step": 1}]
    run.log_file.write_text('{"kind": "step", "step": 1}\n{"kind": "st\n{"kind": "step", "step": 2}\n')
    with pytest.raises(InputError, match=r"log\.jsonl:2: not JSON"):
        _ = run.log


def test_predictions_come_back_as_they_were(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    lines = [{"id": "1", "prediction": "one\u2028line"}, {"id": "2", "prediction": "größer"}]
    run.save_predictions(lines)
    assert run.predictions == lines

"""Check phi3v as `pip install .` leaves it, without any extra. `make test-minimal` runs this in such an environment.

Every module is importable, every command's --help works, a run trains to its report, and whatever needs an extra
says which one.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

import phi3v
from phi3v.base.errors import InputError
from phi3v.cli import COMMANDS, main
from phi3v.model.fp8 import learn_in_fp8
from phi3v.recipes import RECIPES

OPTIONAL = ("av", "bitsandbytes", "deepspeed", "easy_vqa", "gradio", "mlflow", "pyarrow", "tensorboard", "torchao")
TRAIN = "train tiny --train data/train.jsonl --batch-size 2 --max-steps 1"
NEEDING = {
    "demo run": "phi3v[demo]",
    "train easy-vqa": "phi3v[easy-vqa]",
    "train docvqa --data-dir published": "phi3v[hub]",
    "convert video-folder videos --out frames": "phi3v[video]",
    f"{TRAIN} --qlora --out qlora": "phi3v[qlora]",
    f"{TRAIN} --optimizer adamw-8bit --out adamw": "phi3v[qlora]",
    **{f"{TRAIN} --track {name} --out {name}": name for name in ("tensorboard", "wandb", "mlflow")},
}


def run(work: Callable[[], int | None]) -> tuple[int | None, str]:
    """The status of a command and everything it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        status = work()
    return status, output.getvalue()


def succeed(line: str) -> None:
    status, output = run(lambda: main(line.split()))
    assert status == 0, f"phi3v {line}: {output}"


present = [name for name in OPTIONAL if importlib.util.find_spec(name)]
assert not present, f"not a minimal environment: it has {present}"

modules = [module.name for module in pkgutil.walk_packages(phi3v.__path__, "phi3v.") if module.name != "phi3v.__main__"]
for module in modules:
    importlib.import_module(module)
helps = ["", *COMMANDS, *(f"train {recipe}" for recipe in RECIPES)]
for command in helps:
    succeed(f"{command} --help")

with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    for name in ("red", "blue"):
        Path("photos", name).mkdir(parents=True)
        Image.new("RGB", (40, 40), name).save(f"photos/{name}/1.png")
    for file in ("published/train-0.parquet", "videos/jump/1.mp4"):
        Path(file).parent.mkdir(parents=True)
        Path(file).touch()
    succeed("convert imagefolder photos --out data")
    succeed(f"{TRAIN} --eval data/train.jsonl --out run")
    assert Path("run/report.html").is_file()

    for command, extra in NEEDING.items():
        status, output = run(lambda command=command: main(command.split()))
        assert status == 2, f"phi3v {command}: status {status}; {output}"
        assert f"pip install '{extra}'" in output or f"pip install {extra}" in output, f"phi3v {command}: {output}"
    torchrun = [sys.executable, "-I", "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "phi3v"]
    done = subprocess.run(
        [*torchrun, *TRAIN.split(), "--parallel", "zero2", "--out", "zero2"], capture_output=True, text=True
    )
    assert "pip install 'phi3v[deepspeed]'" in done.stderr, done.stderr
    os.chdir("/")
message = ""
try:  # the command asks for a GPU first
    learn_in_fp8(None)  # type: ignore[arg-type]
except InputError as error:
    message = str(error)
assert "phi3v[fp8]" in message
print(f"{len(modules)} modules, {len(helps)} helps, {len(NEEDING) + 2} missing extras")

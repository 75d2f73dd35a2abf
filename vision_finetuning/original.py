"""The command line of the original fine-tuning scripts, over phi3v: their names, flags and defaults.

They also find what they wrote where they wrote it: `eval_before.json`, `eval_after.json` and the model in the output
folder itself. The run folder, with log, checkpoints and report, lies beside them as `run/`.

Two environment variables stand in for what the scripts fetch from the Hugging Face Hub: PHI3V_MODEL, a model folder,
and PHI3V_DATA, a folder with the data sets as they were downloaded, one folder a task (docvqa, hateful_memes, nlvr2).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from phi3v.base.config import Precision, Run
from phi3v.base.errors import InputError
from phi3v.base.files import write_text
from phi3v.base.hardware import has_bf16, pick_device
from phi3v.base.ranks import join
from phi3v.base.runfolder import read_lines
from phi3v.infer.metrics import Prediction, clean
from phi3v.recipes import find_recipe
from phi3v.train.loop import train
from phi3v.train.runlog import say

Task = Literal["docvqa", "hateful_memes", "nlvr2", "ucf101"]
FORCE_BF16 = ("nlvr2", "ucf101")  # their scripts did with --use_flash_attention


def main(task: Task, arguments: Sequence[str] | None = None) -> None:
    """Runs a script's command line to its end. Raises InputError for what the user can mend."""
    recipe = find_recipe(task)
    flags = parser(task, recipe).parse_args(arguments)
    output, options = Path(flags.output_dir), _options(task, recipe, flags)
    if join().first_does(lambda: _put_aside(output)):
        say(f"{output} held a finished run: it is now beside it, under a numbered name")
    result = train(recipe.prepare(resolve(task, recipe, flags), options))
    if result:
        join().first_does(lambda: _write_as_before(task, output))


def parser(task: Task, recipe: ModuleType) -> argparse.ArgumentParser:
    """All flags of the original script; underscores and hyphens are the same."""
    defaults: Run = recipe.settings()
    made = argparse.ArgumentParser(description=(recipe.__doc__ or "").partition("\n")[0], allow_abbrev=False)

    def flag(name: str, **how: Any) -> None:
        names = [f"--{name}", f"--{name.replace('_', '-')}"] if "_" in name else [f"--{name}"]
        made.add_argument(*names, dest=name, **how)

    model = os.environ.get("PHI3V_MODEL", defaults.base.model)
    flag("model_name_or_path", default=model, help="a model folder or a name on the Hub (default: %(default)s)")
    needed = task == "ucf101"
    flag("data_dir", type=Path, required=needed, help="the data set as it was downloaded (ucf101: as converted)")
    if task == "docvqa":
        flag("full_train", action="store_true", help="train on all of DocVQA, not on the mini set")
    flag("use_flash_attention", action="store_true", help="use the fastest exact attention available, and print which")
    flag("bf16", action="store_true", help="bf16, where the hardware has it; default: fp16 with loss scaling")
    flag("use_lora", action="store_true", help="train adapters")
    flag("use_qlora", action="store_true", help="train adapters over 4-bit weights")
    flag("output_dir", default=f"./output/{task}", help="where the model and the scores go (default: %(default)s)")
    flag("batch_size", type=int, default=16, help="examples of an optimizer step, over all GPUs")
    flag(
        "batch_size_per_gpu",
        type=int,
        default=1,
        help="no effect: packs are filled by tokens, the objective is the same",
    )
    flag("num_crops", type=int, default=defaults.base.num_crops, help="tiles an image may be cut into, at most 16")
    flag("num_train_epochs", type=int, default=1)
    flag("learning_rate", type=float, default=4.0e-5)
    flag("wd", type=float, default=0.01, help="weight decay")
    flag("no_tqdm", action="store_true", help="no progress bar")
    flag("lora_rank", type=int, default=64)
    flag("lora_alpha_ratio", type=float, default=2.0, help="alpha is the rank times this")
    flag("lora_dropout", type=float, default=0.0)
    flag("freeze_vision_model", action="store_true", help="freeze the image embedder")
    return made


def resolve(task: Task, recipe: ModuleType, flags: argparse.Namespace) -> Run:
    """The run that the flags ask for; what depends on the hardware is said."""
    if flags.num_crops > 16:
        raise InputError(f"--num_crops is {flags.num_crops}, it must be at most 16")
    run: Run = recipe.settings()
    adapters = {
        "lora": flags.use_lora and not flags.use_qlora,
        "qlora": flags.use_qlora,
        "lora_rank": flags.lora_rank,
        "lora_alpha": float(round(flags.lora_rank * flags.lora_alpha_ratio)),
        "lora_dropout": flags.lora_dropout,
    }
    wants_bf16 = flags.bf16 or (flags.use_flash_attention and task in FORCE_BF16)
    return replace(
        run,
        base=replace(run.base, model=flags.model_name_or_path, num_crops=flags.num_crops, dtype=_precision(wants_bf16)),
        data=replace(run.data, batch_size=flags.batch_size),
        tuning=replace(
            run.tuning,
            freeze_vision_model=flags.freeze_vision_model,
            **(adapters if flags.use_lora or flags.use_qlora else {}),
        ),
        optim=replace(
            run.optim, epochs=flags.num_train_epochs, learning_rate=flags.learning_rate, weight_decay=flags.wd
        ),
        keeping=replace(run.keeping, out=Path(flags.output_dir) / "run", resume="auto", progress=not flags.no_tqdm),
    )


def _precision(wants_bf16: bool) -> Precision:
    """As asked for, where the hardware has it."""
    device = pick_device()
    wanted: Precision = "bf16" if wants_bf16 else "fp16"
    if device.type == "cpu" and not (wants_bf16 and has_bf16(device)):
        say(f"{wanted} would be slow on this CPU: fp32 instead")
        return "fp32"
    if wants_bf16 and not has_bf16(device):
        say("this GPU has no bf16: fp16 with loss scaling instead")
        return "fp16"
    return wanted


def _options(task: Task, recipe: ModuleType, flags: argparse.Namespace) -> Any:
    own = {"full_train": flags.full_train} if task == "docvqa" else {}
    data_dir = flags.data_dir
    if data_dir is None and (root := os.environ.get("PHI3V_DATA")):
        data_dir = Path(root) / task
    return recipe.Options(data_dir=data_dir, **own)


def _put_aside(output: Path) -> bool:
    """A finished run makes room for the next: output -> output.1, or the next number that is free."""
    if not (output / "run" / "metrics.json").exists():
        return False
    number = 1
    while output.with_name(f"{output.name}.{number}").exists():
        number += 1
    output.rename(output.with_name(f"{output.name}.{number}"))
    return True


def _write_as_before(task: Task, output: Path) -> None:
    for split, name in (("before", "predictions-before.jsonl"), ("after", "predictions.jsonl")):
        lines = read_lines(output / "run" / name)
        write_text(output / f"eval_{split}.json", json.dumps(as_before(task, lines), indent=4))
    for file in (output / "run" / "final").iterdir():
        target = output / file.name
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:  # no hard links on this file system
            shutil.copy2(file, target)
    say(f"scores  {output / 'eval_before.json'}, {output / 'eval_after.json'}")


def as_before(task: Task, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """What the original script wrote into eval_before.json and eval_after.json."""
    if task == "docvqa":
        return {
            "answers_unique": [line["answers"] for line in predictions],
            "generated_texts_unique": [clean(line["prediction"]) for line in predictions],
            "anls": _mean([line["anls"] for line in predictions]),
        }
    answers = [clean(line["answers"][0]).lower() for line in predictions]
    texts = [clean(line["prediction"]).lower() for line in predictions]
    scores = {"accuracy": _mean([line["correct"] for line in predictions])}
    if task == "ucf101":
        ids = [line["id"] for line in predictions]
        return {
            "answers_unique": [{"id": i, "answer": text} for i, text in zip(ids, answers, strict=True)],
            "generated_texts_unique": [{"id": i, "generated_text": text} for i, text in zip(ids, texts, strict=True)],
            **scores,
        }
    return {"answers_unique": answers, "generated_texts_unique": texts, **scores}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

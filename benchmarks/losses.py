"""Ten steps of every mode, to the last bit: what a change that is not about numerics must leave alone.

    python -m benchmarks.losses FOLDER                          before the change: data, a model, losses.json
    python -m benchmarks.losses FOLDER                          after it: compared, exit status 1 if a bit differs
    python -m benchmarks.losses FOLDER --flags "--decay matrices"    with further flags for every run

It talks to the command line alone, so that it runs over any version of the sources (`PYTHONPATH=.../src`). Losses and
gradient norms are compared as hexadecimal floats. They hold for one machine and one set of packages.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

STEPS = 10
MODES = {
    "full": "",
    "full-eager": "--attention eager",
    "full-recomputed": "--activation-checkpointing full",
    "full-cosine": "--schedule cosine --vision-learning-rate 1e-4 --projector-learning-rate 3e-4",
    "full-8bit": "--optimizer adamw-8bit",
    "full-bf16": "--optimizer adamw-bf16 --dtype bf16",
    "frozen": "--freeze-vision-model",
    "frozen-embeddings": "--freeze vision projector embeddings",
    "lora": "--lora --lora-rank 8",
    "lora-frozen": "--lora --lora-rank 8 --lora-dropout 0.1 --freeze-vision-model",
    "dora": "--lora --lora-rank 8 --dora --rslora",
    "qlora": "--qlora --lora-rank 8 --double-quant --quantize vision",
    "unshared": "--no-share-prefix",
    "unpacked": "--no-pack",
    "small-packs": "--max-tokens-per-pack 1200",
    "expected": "--questions expected --batch-size 3",
    "random": "--questions random --batch-size 3",
    "token": "--weighting token",
    "workers": "--num-workers 2",
}
RANKS = {"ddp": "", "ddp-lora": "--lora --lora-rank 8", "fsdp2": "--parallel fsdp2"}
RANKS |= {"zero2": "--parallel zero2", "zero3": "--parallel zero3"}


def make_data(folder: Path) -> Path:
    """Questions about pages of one to three crops, about two images at once, over two turns, and about none."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number, (height, width) in enumerate([(40, 40), (60, 40), (40, 120), (90, 90), (30, 70), (80, 80)]):
        row, column, color = np.indices((height, width, 3))
        pixels = (row * (3 + number) + column * 5 + color * 80 + number * 40) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(images / f"{number}.png")
    conversations = []
    for number in range(6):
        for question, answer in (("what color", "red"), ("what shape is it", "a small circle"), ("is it blue", "no")):
            conversations.append([{"images": [f"{number}.png"], "user": question, "assistant": answer}])
    conversations.append([{"images": ["0.png", "1.png"], "user": "which is red", "assistant": "the first"}])
    conversations.append([{"user": "answer briefly", "assistant": "yes"}])
    turns = [{"images": ["2.png"], "user": "what is this", "assistant": "a blue line"}]
    conversations.append([*turns, {"user": "and is it long", "assistant": "yes, very"}])
    lines = [json.dumps({"id": str(number), "conversations": turns}) for number, turns in enumerate(conversations)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def run(folder: Path, name: str, flags: str, num_ranks: int) -> list[str]:
    """[loss norm, ...] of the steps of one run, in hexadecimal."""
    out = folder / "runs" / name
    shutil.rmtree(out, ignore_errors=True)
    ranks = f"--nproc_per_node={num_ranks} --master_port=29677"
    program = f"-m torch.distributed.run {ranks} -m phi3v" if num_ranks > 1 else "-m phi3v"
    common = f"--max-steps {STEPS} --warmup-steps 2 --batch-size 8 --num-crops 2 --num-workers 0 --no-progress"
    command = f"{sys.executable} {program} train tiny --train {folder / 'train.jsonl'} --out {out} {common} {flags}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {command}\n{done.stdout}\n{done.stderr}")
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [f"{e['loss'].hex()} {e['grad_norm'].hex()}" for e in entries if e["kind"] == "step"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flags", default="", help="for every run")
    parser.add_argument("--only", nargs="*", help="these modes")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if not (folder / "train.jsonl").exists():
        make_data(folder)
    kept = folder / "losses.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    every = [(name, flags, 1) for name, flags in MODES.items()] + [(name, flags, 2) for name, flags in RANKS.items()]
    found, different = dict(before), []
    for name, flags, num_ranks in every:
        if arguments.only and name not in arguments.only:
            continue
        steps = run(folder, name, f"{flags} {arguments.flags}", num_ranks)
        same = before.get(name, steps) == steps and len(steps) == STEPS
        found.setdefault(name, steps)
        print(f"{name:<20}{'same' if name in before and same else 'kept' if same else 'DIFFERENT'}", flush=True)
        if not same:
            different.append(name)
            for number, (was, now) in enumerate(zip(before.get(name, steps), steps, strict=False), start=1):
                if was != now:
                    print(f"    step {number}: {was} -> {now}")
                    break
    kept.write_text(json.dumps(found, indent=1))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

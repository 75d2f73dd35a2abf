"""What the data side costs: memory by the number of examples, and pages a second that a core reads.

    python -m benchmarks.data [--examples 1000 10000 100000] [--pages 40] [--json FILE]

Pages are letters (1275 x 1650, 17 crops) in JPEG with four questions each. For memory every number of examples is a
process of its own that reads and encodes a data file, plans its epoch and makes the first packs; its pages are hard
links to a few pictures, as many as there would be. For speed one process, without workers, makes packs of all pages.
The file is checked before, as in training: that decodes every image.

Expected: a page is decoded, resized and cut by PIL, 0.15 s or so on one core; an example's text and token ids lie on
disk, so that 0.2 kB or so of it stay in memory; pictures never stay.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.bench.sample import ANSWER, SHAPES, WORDS
from PIL import Image

from phi3v.base.files import write_text
from phi3v.base.hardware import environment, pick_device
from phi3v.base.ranks import ALONE
from phi3v.data.check import check
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import iter_jsonl
from phi3v.packing.loader import Reading, training_packs
from phi3v.packing.schedule import ScheduleSettings, schedule_epoch
from phi3v.packing.trees import Lengths, PackLimits
from phi3v.recipes.easy_vqa import build_tokenizer
from phi3v.train.feed import encode_all

QUESTIONS, PICTURES = 4, 40
LIMITS = PackLimits(max_tokens_per_pack=8192, max_crops_per_pack=64)


def make_data(folder: Path, pages: int, pictures: int = PICTURES) -> Path:
    """`pages` pages, of which `pictures` are stored, with QUESTIONS questions each."""
    noise, (width, height) = np.random.default_rng(0), SHAPES["docvqa"].size
    (folder / "images").mkdir()
    for page in range(pages):
        file = folder / "images" / f"{page:06d}.jpg"
        if page < pictures:
            picture = noise.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            Image.fromarray(picture).resize((width, height)).save(file, quality=90)
        else:
            os.link(folder / "images" / f"{page % pictures:06d}.jpg", file)
    with (folder / "data.jsonl").open("w") as stream:
        for number in range(QUESTIONS * pages):
            words = [WORDS[(number + k) % len(WORDS)] for k in range(12)]
            image = f"{number // QUESTIONS:06d}.jpg"
            turn = {"images": [image], "user": f"{' '.join(words)} {number}", "assistant": ANSWER}
            stream.write(json.dumps({"id": str(number), "source": "letters", "conversations": [turn]}) + "\n")
    return folder / "data.jsonl"


def read(file: Path, max_packs: int | None) -> dict[str, Any]:
    """Memory and time of a data file, from its first line to packs; MB are of this process."""
    processor = Phi3VProcessor(build_tokenizer([" ".join(WORDS)]), num_crops=SHAPES["docvqa"].num_crops)
    before = resident_mb()
    started = time.perf_counter()
    assert check(file, None, processor).ok
    checked = time.perf_counter()
    _, encoded = encode_all(iter_jsonl(file), processor, ALONE)
    plan = schedule_epoch(Lengths.of(encoded), ScheduleSettings(batch_size=64, limits=LIMITS), seed=0, epoch=0)
    ready, kept = time.perf_counter(), resident_mb()
    pages = 0
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops)
    for number, micro in enumerate(training_packs(encoded, plan, reading), start=1):
        pages += len(micro.pack.image_sizes)
        if number == max_packs:
            break
    return {
        "examples": len(encoded),
        "kept_mb": kept - before,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
        "check_s": checked - started,
        "ready_s": ready - checked,
        "pages_per_s": pages / (time.perf_counter() - ready),
    }


def resident_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--pages", type=int, default=40, help="read to measure the speed of a core")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max-packs", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read, arguments.max_packs)))
        return
    rows = []
    for examples, max_packs in [*((n, 5) for n in arguments.examples), (QUESTIONS * arguments.pages, None)]:
        with tempfile.TemporaryDirectory() as folder:
            file = make_data(Path(folder), -(-examples // QUESTIONS))
            command = [sys.executable, "-m", "benchmarks.data", "--read", str(file)]
            command += [] if max_packs is None else ["--max-packs", str(max_packs)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        if max_packs is None:
            print(f"{row['pages_per_s']:.1f} pages/s a core")
        else:
            print(
                f"{row['examples']:>9,} examples: {row['kept_mb']:7.1f} MB kept, {row['peak_mb']:7.1f} MB at most, "
                f"checked in {row['check_s']:.1f} s, read and planned in {row['ready_s']:.1f} s",
                flush=True,
            )
        rows.append(row)
    if arguments.json:
        content = {"rows": rows, "environment": environment(pick_device())}
        write_text(arguments.json, json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

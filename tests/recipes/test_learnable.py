"""Each recipe of the guide learns: on made-up data of its published form, from a small random checkpoint to over 90 %.

In every task a model that does not look at the pictures stays at chance: what is asked is the same, and every answer as
frequent as the others. The checkpoint is made as the quickstart's is, a size smaller.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from phi3v.cli import main
from phi3v.recipes import easy_vqa

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 50)}
SIDE = 64
TESTED = 200


def plain(color: str, dice: random.Random) -> bytes:
    """A picture of about that color."""
    shade = tuple(max(0, min(255, value + dice.randint(-25, 25))) for value in COLOURS[color])
    return png(Image.new("RGB", (SIDE, SIDE), shade))


def png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def other(color: str, dice: random.Random) -> str:
    return dice.choice([name for name in COLOURS if name != color])


def docvqa(folder: Path, count: int, dice: random.Random, published: ModuleType) -> None:
    """What is written there? One of four words."""
    words = ("I", "NO", "STOP", "ENTRANCE")

    def rows(split: str, count: int) -> list[dict[str, Any]]:
        made = []
        for number in range(count):
            page = Image.new("RGB", (SIDE, SIDE), "white")
            word, place = dice.choice(words), (dice.randint(1, 4), dice.randint(4, 40))
            ImageDraw.Draw(page).text(place, word, fill="black", font=ImageFont.load_default(size=14))
            question = dict.fromkeys(("de", "en", "es", "fr", "it"), "what is written here?")
            made.append(
                {
                    "id": f"{split}_{number}",
                    "image": published.cell(png(page)),
                    "query": question,
                    "answers": [word.lower()],
                    "words": [],
                    "bounding_boxes": [],
                    "answer": {"match_score": 1.0, "matched_text": word, "start": 0, "text": word},
                }
            )
        return made

    for split, size in (("train", count), ("test", TESTED)):
        published.write_parquet(published.shards(folder / "data", split, 1), "mini", rows(split, size))


def hateful_memes(folder: Path, count: int, dice: random.Random, published: ModuleType) -> None:
    """Does the caption name the color of the picture? Neither alone tells."""
    rows = []
    for number in range(TESTED + count):
        color, matches = dice.choice(list(COLOURS)), number % 2 == 0
        caption = color if matches else other(color, dice)
        prompt = f"The caption says {caption} . Is this meme hateful?"
        rows.append(([plain(color, dice)], [(prompt, "Yes." if matches else "No.")]))
    published.write_cauldron(folder, "hateful_memes", rows, num_shards=1)


def nlvr2(folder: Path, count: int, dice: random.Random, published: ModuleType) -> None:
    """Do both photographs have the same color?"""
    folder.mkdir(parents=True)
    for split, size in (("train", count), ("dev", TESTED)):
        lines = []
        for number in range(size):
            color, same = dice.choice(list(COLOURS)), number % 2 == 0
            for side, shown in enumerate((color, color if same else other(color, dice))):
                (folder / f"{split}-{number}-0-img{side}.png").write_bytes(plain(shown, dice))
            sentence = {"sentence": "Both are of one color.", "label": str(same), "identifier": f"{split}-{number}-0-0"}
            lines.append(json.dumps({**sentence, **({"directory": 0} if split == "train" else {})}) + "\n")
        (folder / f"{split}.json").write_text("".join(lines))


def ucf101(folder: Path, count: int, dice: random.Random, published: ModuleType) -> None:
    """Which way does the square move?"""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'phi3v[video]'")
    ways = {"Down": (0, 1), "Left": (-1, 0), "Right": (1, 0), "Up": (0, -1)}

    def video(file: Path, way: tuple[int, int]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        start = np.array([dice.randint(26, 38), dice.randint(26, 38)])
        with av.open(str(file), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width = stream.height = SIDE
            stream.pix_fmt, stream.codec_context.codec_tag = "yuv420p", "XVID"
            for step in range(9):
                frame = Image.new("RGB", (SIDE, SIDE), (20, 20, 20))
                x, y = start + np.array(way) * step * Fraction(20, 6)
                ImageDraw.Draw(frame).rectangle((float(x) - 10, float(y) - 10, float(x) + 10, float(y) + 10), "white")
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())

    for split, size in (("train", count), ("val", TESTED), ("test", len(ways))):
        for number in range(size):
            name, way = list(ways.items())[number % len(ways)]
            video(folder / "UCF101_subset" / split / name / f"v_{name}_g{number:04d}_c01.avi", way)


@dataclass(frozen=True)
class Lesson:
    """How a task is taught."""

    write: Callable[[Path, int, random.Random, ModuleType], None]
    examples: int
    chance: float
    flags: str = ""


LESSONS = {
    "docvqa": Lesson(docvqa, 2400, 1 / 4),
    "hateful-memes": Lesson(hateful_memes, 7200, 1 / 2, f"--eval-size {TESTED}"),
    "nlvr2": Lesson(nlvr2, 3200, 1 / 2),
    "ucf101": Lesson(ucf101, 1600, 1 / 4, "--num-frames 3"),
}


@pytest.fixture
def small_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], None]:
    """The quickstart's way to make a checkpoint, for a smaller one."""
    clip = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    decoder = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setattr(easy_vqa, "CLIP", clip)
    monkeypatch.setattr(easy_vqa, "DECODER", {**decoder, "initializer_range": 0.125})
    return easy_vqa.build_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("task", LESSONS)
def test_a_recipe_learns_its_task(
    task: str,
    small_checkpoint: Callable[[Path, Path], None],
    published: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lesson = LESSONS[task]
    torch.set_num_threads(2)
    lesson.write(tmp_path / "data", lesson.examples, random.Random(0), published)
    options = f"--data-dir {tmp_path / 'data'} --converted-dir {tmp_path / 'converted'} {lesson.flags}"
    flags = f"--num-crops 1 --dtype fp32 --num-workers 0 --max-new-tokens 8 --out {tmp_path / 'run'} --no-progress"
    learning = "--learning-rate 3e-3 --schedule constant --warmup-steps 20 --batch-size 16 --epochs 1"

    def phi3v(model: Path, *more: str) -> int:
        return main(["train", task, *f"{options} --model {model} {flags} {learning}".split(), *more])

    convert(task, options.split())
    train = next(file for file in sorted((tmp_path / "converted").glob("*train.jsonl")))
    small_checkpoint(tmp_path / "model", train)
    assert phi3v(tmp_path / "model") == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["baselines"]["blind"] < lesson.chance + 0.1
    assert found["before"]["accuracy"] < lesson.chance + 0.1
    assert found["final"]["accuracy"] > 0.9, found["final"]


def convert(task: str, options: Sequence[str]) -> None:
    """The recipe's own conversion: the checkpoint's tokenizer is made of its texts."""
    import tyro

    from phi3v.recipes import find_recipe

    recipe = find_recipe(task)
    chosen = tyro.cli(tyro.conf.OmitArgPrefixes[recipe.Options], args=list(options))
    recipe.prepare(recipe.settings(chosen), chosen)

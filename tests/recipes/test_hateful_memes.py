from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from phi3v.base.errors import InputError
from phi3v.recipes.hateful_memes import Options, prepare, settings

Read = Callable[[Path], list[dict[str, Any]]]

TURN = "Does this meme promote hate speech?\nAnswer yes or no."


def prepared(folder: Path, **options: Any) -> tuple[Path, Path]:
    run = prepare(settings(), Options(data_dir=folder, **options))
    assert run.data.train
    assert run.data.eval
    return run.data.train[0], run.data.eval[0]


def answers(lines: list[dict[str, Any]]) -> list[str]:
    return [line["conversations"][0]["assistant"] for line in lines]


def test_settings_are_the_original_s() -> None:
    run = settings()
    assert (run.base.model, run.base.num_crops) == ("microsoft/Phi-3-vision-128k-instruct", 16)
    assert (run.data.batch_size, run.data.questions, run.optim.learning_rate, run.optim.epochs) == (16, "all", 4e-5, 1)


def test_cauldron(tmp_path: Path, published: ModuleType, read: Read) -> None:
    """Of every row the first text, the first rows to evaluate on."""
    texts = [("Is the language used in this meme hateful?\nAnswer yes or no.", "Yes."), ("left away?", "No.")]
    published.write_cauldron(tmp_path, "hateful_memes", [([published.picture(n)], texts) for n in range(7)], 3)
    train, test = prepared(tmp_path, eval_size=3)
    lines = read(train)
    assert lines[0] == {
        "id": "train-3",
        "source": "hateful-memes",
        "conversations": [{"images": ["train/3.png"], "user": texts[0][0], "assistant": "Yes."}],
    }
    assert [line["id"] for line in read(test) + lines] == [f"{'test' if n < 3 else 'train'}-{n}" for n in range(7)]
    assert [(train.parent / f"images/train/{n}.png").read_bytes() for n in range(3, 7)] == [
        published.picture(n) for n in range(3, 7)
    ]


@pytest.mark.parametrize("dev", ["dev_seen", "dev"])
@pytest.mark.parametrize("below", ["", "data"])
def test_challenge(dev: str, below: str, tmp_path: Path, published: ModuleType, read: Read) -> None:
    published.write_memes(tmp_path / below, dev)
    train, test = prepared(tmp_path)
    lines = read(train)
    assert lines[3] == {
        "id": "3",
        "source": "hateful-memes",
        "conversations": [{"images": ["train/00003.png"], "user": TURN, "assistant": "Yes."}],
    }
    assert answers(lines) == ["No.", "Yes.", "No.", "Yes.", "No."]
    assert [line["id"] for line in read(test)] == ["1000", "1001", "1002"]
    assert (test.parent / "images/test/01001.png").read_bytes() == published.picture(1001)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 1.5}, r"train.jsonl:1: unknown label 1.5, expected 0 or 1"),
        ({"label": 2}, r"train.jsonl:1: unknown label 2, expected 0 or 1"),
        ({"label": [1]}, r"train.jsonl:1: unknown label \[1\], expected 0 or 1"),
        ({"img": 5}, r"train.jsonl:1: img is 5, which it cannot be"),
        ({"label": None}, r"train.jsonl:1: there is no 'label' in it"),
        ({"img": "img/99999.png"}, r"train.jsonl: 1 of its 5 images are nowhere in .*, like 99999.png"),
        ({"img": "../../99999.png"}, r"like 99999.png"),
    ],
)
def test_damaged_lines(change: dict[str, Any], message: str, tmp_path: Path, published: ModuleType) -> None:
    published.write_memes(tmp_path)
    first, *rest = (tmp_path / "train.jsonl").read_text().splitlines()
    changed = {key: value for key, value in (json.loads(first) | change).items() if value is not None}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(changed), *rest]))
    with pytest.raises(InputError, match=message):
        prepared(tmp_path)
    assert not list((tmp_path / "phi3v").glob("hateful*"))


def test_what_is_missing_is_named(tmp_path: Path, published: ModuleType) -> None:
    for name in "fedcba":
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"holds no Hateful Memes: .*; found a/, b/, c/, d/, e/ and 1 more"):
        prepared(tmp_path)
    published.write_memes(tmp_path)
    (tmp_path / "train.jsonl").rename(tmp_path / "train.jsonl.part")
    with pytest.raises(InputError, match=r"holds only Hateful Memes' dev_seen.jsonl: give --train"):
        prepared(tmp_path)
    with pytest.raises(InputError, match=r"--data-dir .*nowhere: no such folder"):
        prepared(tmp_path / "nowhere")


def test_cauldron_with_an_answer_of_another_task(tmp_path: Path, published: ModuleType) -> None:
    published.write_cauldron(tmp_path, "hateful_memes", [([published.picture(0)], [("so?", "Ada.")])], num_shards=1)
    with pytest.raises(InputError, match=r"row 0: unknown answer 'Ada.', expected Yes. or No."):
        prepared(tmp_path)

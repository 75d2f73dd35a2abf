from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from phi3v.base.errors import InputError
from phi3v.data.encode import encode
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.recipes.nlvr2 import Options, prepare, settings

Read = Callable[[Path], list[dict[str, Any]]]

TEXTS = [("Is it {so}? Answer yes or no.", "Yes."), ("And so?", "No."), ("Or so?", "No.")]

LAYOUTS: dict[str, Callable[[str, int], str]] = {
    "flat": lambda split, directory: ".",
    "images of the release": lambda split, directory: f"images/train/{directory}" if split == "train" else split,
    "images by split": lambda split, directory: f"images/{split}",
}


def prepared(folder: Path, **options: Any) -> tuple[Path, Path]:
    run = prepare(settings(), Options(data_dir=folder, **options))
    assert run.data.train
    assert run.data.eval
    return run.data.train[0], run.data.eval[0]


def write_rows(published: ModuleType, folder: Path, count: int = 6) -> None:
    """Row n shows pictures 2n and 2n + 1 and has n % 3 + 1 texts."""
    rows = [([published.picture(2 * n), published.picture(2 * n + 1)], TEXTS[: n % 3 + 1]) for n in range(count)]
    published.write_cauldron(folder, "nlvr2", rows)


def test_settings_are_the_original_s() -> None:
    run = settings()
    assert (run.base.model, run.base.num_crops) == ("microsoft/Phi-3.5-vision-instruct", 16)
    assert (run.data.batch_size, run.data.questions, run.optim.learning_rate, run.optim.epochs) == (16, "all", 4e-5, 1)


def test_cauldron(tmp_path: Path, published: ModuleType, read: Read) -> None:
    write_rows(published, tmp_path)
    train, test = prepared(tmp_path, eval_size=2)
    lines = read(train)
    assert lines[0] == {
        "id": "train-2",
        "source": "nlvr2",
        "conversations": [
            {"images": ["train/2-0.png", "train/2-1.png"], "user": TEXTS[0][0], "assistant": "Yes."},
            {"user": "And so?", "assistant": "No."},
            {"user": "Or so?", "assistant": "No."},
        ],
        "closed_turns": True,
    }
    assert [len(line["conversations"]) for line in lines] == [3, 1, 2, 3]
    assert [line.get("closed_turns", False) for line in lines] == [True, False, True, True]
    for number in range(2, 6):
        for side in (0, 1):
            file = train.parent / "images" / "train" / f"{number}-{side}.png"
            assert file.read_bytes() == published.picture(2 * number + side)
    assert [line["conversations"] for line in read(test)] == [
        [{"images": [f"test/{n}-0.png", f"test/{n}-1.png"], "user": TEXTS[0][0], "assistant": "Yes."}] for n in (0, 1)
    ]


def test_branches_are_the_sentences_one_by_one(tmp_path: Path, published: ModuleType, read: Read) -> None:
    write_rows(published, tmp_path)
    turns, test = prepared(tmp_path, eval_size=2)
    branches, same = prepared(tmp_path, eval_size=2, turns="branches")
    assert same == test
    assert [line["id"] for line in read(branches)[:4]] == ["train-2-0", "train-2-1", "train-2-2", "train-3-0"]
    alone = [
        [{"images": conversation["conversations"][0]["images"], **turn}]
        for conversation in read(turns)
        for turn in conversation["conversations"]
    ]
    assert [line["conversations"] for line in read(branches)] == alone
    assert not any("closed_turns" in line for line in read(branches))


def test_turns_have_the_ids_of_the_original_s_collator(
    tmp_path: Path, published: ModuleType, tiny_processor_dir: Path
) -> None:
    """Prompt by prompt with its own <s>, after each the answer with `<|end|>\\n<|endoftext|>`."""
    write_rows(published, tmp_path)
    train, _ = prepared(tmp_path, eval_size=2)
    processor = Phi3VProcessor.from_pretrained(tiny_processor_dir, num_crops=4)
    expected: list[int] = []
    for number, (user, assistant) in enumerate(TEXTS):
        images = "<|image_1|><|image_2|>\n" if number == 0 else ""
        expected += [processor.bos_token_id, *processor.token_ids(f"<|user|>\n{images}{user}<|end|>\n<|assistant|>\n")]
        expected += processor.tokenizer(f"{assistant}<|end|>\n<|endoftext|>", add_special_tokens=False)["input_ids"]
    assert encode(read_jsonl(train)[0], processor).ids.tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_release(layout: str, tmp_path: Path, published: ModuleType, read: Read) -> None:
    published.write_nlvr2(tmp_path, LAYOUTS[layout])
    train, dev = prepared(tmp_path)
    lines = read(train)
    assert [(line["id"], len(line["conversations"])) for line in lines] == [
        *(("train-0-0", 2), ("train-0-1", 1), ("train-1-0", 2), ("train-1-1", 2))
    ]
    prefix = "The first image is the image on the left, the second image is the image on the right. "
    assert lines[0]["conversations"] == [
        {
            "images": ["train/train-0-0-img0.png", "train/train-0-0-img1.png"],
            "user": prefix + "Given the left and right images, does the statement "
            '"sentence 0 of set 0 holds {true}." hold true? Answer yes or no.',
            "assistant": "No.",
        },
        {"user": lines[0]["conversations"][0]["user"].replace("sentence 0", "sentence 1"), "assistant": "Yes."},
    ]
    assert (train.parent / "images/train/train-1-1-img1.png").read_bytes() == published.picture(13, "JPEG")
    assert dev.name == "dev.jsonl"
    assert [(line["id"], line["group"]) for line in read(dev)[:4]] == [
        *(("dev-0-0-0", "dev-0-0"), ("dev-0-0-1", "dev-0-1"), ("dev-0-1-0", "dev-0-0"), ("dev-1-0-0", "dev-1-0"))
    ]
    assert len(read(dev)) == len(read(dev.with_name("test1.jsonl"))) == 7


def test_test1_stands_in_for_dev(tmp_path: Path, published: ModuleType, read: Read) -> None:
    published.write_nlvr2(tmp_path, LAYOUTS["flat"], splits=("train", "test1"))
    _, test = prepared(tmp_path, turns="branches")
    assert test.name == "test1.jsonl"
    assert len(read(test)) == 7


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train.json", {"label": "Maybe"}, r"train.json:1: unknown label 'Maybe', expected True or False"),
        (
            "train.json",
            {"identifier": "train-9-9-0"},
            r"train.json: 2 of its 10 images are nowhere in .*, like train-9-9-img0",
        ),
        ("dev.json", {"identifier": 7}, r"dev.json:1: identifier is 7, which it cannot be"),
        ("dev.json", {"sentence": None}, r"dev.json:1: there is no 'sentence' in it"),
        ("dev.json", {"identifier": "dev-0-0-x-0"}, r"dev.json: 2 of its 10 images are nowhere"),
    ],
)
def test_damaged_lines(file: str, change: dict[str, Any], message: str, tmp_path: Path, published: ModuleType) -> None:
    published.write_nlvr2(tmp_path, LAYOUTS["flat"])
    first, *rest = (tmp_path / file).read_text().splitlines()
    changed = {key: value for key, value in (json.loads(first) | change).items() if value is not None}
    (tmp_path / file).write_text("\n".join([json.dumps(changed), *rest]))
    with pytest.raises(InputError, match=message):
        prepared(tmp_path)
    assert not list((tmp_path / "phi3v").glob("nlvr2*"))


def test_cauldron_with_an_answer_of_another_task(tmp_path: Path, published: ModuleType) -> None:
    pair = [published.picture(0), published.picture(1)]
    published.write_cauldron(tmp_path, "nlvr2", [(pair, [("so?", "Yes.")]), (pair, [("so?", "Maybe.")])])
    with pytest.raises(InputError, match=r"train-00001-of-00002.*parquet, row 0: unknown answer 'Maybe.'"):
        prepared(tmp_path, eval_size=1)


def test_all_rows_are_for_evaluation(tmp_path: Path, published: ModuleType) -> None:
    write_rows(published, tmp_path)
    with pytest.raises(InputError, match=r"nlvr2: of its 6 rows none is left for train.jsonl"):
        prepared(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path, published: ModuleType) -> None:
    (tmp_path / "nlvr2.zip").touch()
    with pytest.raises(InputError, match=r"holds no NLVR2: expected nlvr2/train-.* or train.json, .*; found nlvr2.zip"):
        prepared(tmp_path)
    published.write_nlvr2(tmp_path, LAYOUTS["flat"], splits=("dev", "test1"))
    with pytest.raises(InputError, match=r"holds only NLVR2's dev.json, NLVR2's test1.json: give --train"):
        prepared(tmp_path)


def test_from_the_hub(tmp_path: Path, published: ModuleType, monkeypatch: pytest.MonkeyPatch, read: Read) -> None:
    write_rows(published, tmp_path / "hub")
    monkeypatch.setattr("phi3v.data.hub.snapshot_download", lambda repository, **kinds: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    run = prepare(settings(), Options(eval_size=1))
    assert run == replace(
        settings(),
        data=replace(settings().data, train=Path("data/nlvr2/train.jsonl"), eval=Path("data/nlvr2/test.jsonl")),
    )
    assert len(read(Path("data/nlvr2/train.jsonl"))) == 5

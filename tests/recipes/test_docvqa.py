from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from phi3v.base.config import Data, Run
from phi3v.base.errors import InputError
from phi3v.recipes import docvqa
from phi3v.recipes.docvqa import Options, prepare, settings

Read = Callable[[Path], list[dict[str, Any]]]

HINTED = [
    ("what is the date?\nYour answer should be very brief.", "OCTOBER 17, 1995."),
    ("who signed?\nEnsure brevity in your answer. ", "Ada."),
    ("no hint\nin this one?", "None."),
]


def both(run: Run) -> tuple[Path, Path]:
    assert run.data.train
    assert run.data.eval
    return run.data.train[0], run.data.eval[0]


def pages(lines: list[dict[str, Any]]) -> list[str]:
    return [line["conversations"][0]["images"][0] for line in lines]


def asked(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(line["conversations"][0]["user"], line["conversations"][0]["assistant"]) for line in lines]


def write_pages(published: ModuleType, folder: Path, count: int = 5) -> None:
    rows = [([published.picture(n, "JPEG" if n % 2 else "PNG")], HINTED[: n % 3 + 1]) for n in range(count)]
    published.write_cauldron(folder, "docvqa", rows)


def test_settings_are_the_original_s() -> None:
    run = settings()
    assert (run.base.model, run.base.num_crops) == ("microsoft/Phi-3-vision-128k-instruct", 16)
    assert (run.data.batch_size, run.data.questions, run.optim.learning_rate, run.optim.epochs) == (
        16,
        "expected",
        4e-5,
        1,
    )


def test_mini_set(tmp_path: Path, published: ModuleType, read: Read) -> None:
    published.write_mini(tmp_path)
    train, test = both(prepare(settings(), Options(data_dir=tmp_path)))
    assert train.parent == tmp_path / "phi3v" / "docvqa"
    lines = read(train)
    assert lines[2] == {
        "id": "train-train_2",
        "source": "docvqa",
        "conversations": [
            {"images": ["train/2.png"], "user": "what is 2 (en)?\nAnswer briefly.", "assistant": "Answer 2"}
        ],
        "answers": ["Answer 2", "answer 2"],
    }
    assert len(lines) == len(set(pages(lines))) == 4  # also where two rows show the same page
    assert (train.parent / "images/train/2.png").read_bytes() == published.picture(2)
    assert [line["answers"] for line in read(test)] == [["Answer 0", "answer 0"], ["Answer 1", "answer 1"]]


def test_full_train_learns_the_cauldron_and_asks_the_mini_set(
    tmp_path: Path, published: ModuleType, read: Read
) -> None:
    write_pages(published, tmp_path / "the_cauldron")
    published.write_mini(tmp_path / "docvqa_1200_examples")
    train, test = both(prepare(settings(), Options(data_dir=tmp_path, full_train=True)))
    lines = read(train)
    assert pages(lines) == [
        "train/0.png",
        *["train/1.jpg"] * 2,
        *["train/2.png"] * 3,
        "train/3.jpg",
        *["train/4.png"] * 2,
    ]
    assert asked(lines[3:6]) == [
        ("what is the date?\nAnswer briefly.", "OCTOBER 17, 1995."),
        ("who signed?\nAnswer briefly.", "Ada."),
        ("no hint\nin this one?\nAnswer briefly.", "None."),
    ]
    for number in range(5):
        (file,) = (train.parent / "images" / "train").glob(f"{number}.*")
        assert file.read_bytes() == published.picture(number, "JPEG" if number % 2 else "PNG")
    assert [line["id"] for line in read(test)] == ["test-test_0", "test-test_1"]


def test_the_original_s_two_prompts(tmp_path: Path, published: ModuleType, read: Read) -> None:
    write_pages(published, tmp_path)
    published.write_mini(tmp_path)
    options = Options(data_dir=tmp_path, full_train=True)
    one, test = both(prepare(settings(), options))
    original, same = both(prepare(settings(), Options(data_dir=tmp_path, full_train=True, prompts="original")))
    assert same == test
    assert asked(read(original)[3:6]) == HINTED
    assert pages(read(original)) == pages(read(one))
    assert read(test)[0]["conversations"][0]["user"].endswith("\nAnswer briefly.")


@pytest.mark.parametrize("pictures", ["documents", "spdocvqa_images"])
def test_challenge(pictures: str, tmp_path: Path, published: ModuleType, read: Read) -> None:
    published.write_challenge(tmp_path, pictures)
    train, test = both(prepare(settings(), Options(data_dir=tmp_path)))
    lines = read(train)
    assert pages(lines) == [f"train/abcd{number:04d}_1.png" for number in (0, 0, 1, 1, 2, 2)]
    assert lines[3]["answers"] == ["1 1", "1, 1"]
    assert asked(lines[3:4]) == [("what is 1?\nAnswer briefly.", "1 1")]
    assert [line["id"] for line in read(test)] == [f"test-{10 * number + n}" for number in (50, 51, 52) for n in (0, 1)]
    page = tmp_path / pictures / "abcd0000_1.png"
    assert (train.parent / "images/train/abcd0000_1.png").samefile(page)  # no second copy of gigabytes


def test_which_form_wins(tmp_path: Path, published: ModuleType, read: Read) -> None:
    """Without --full-train the mini set, if it is there; the questions of what is learnt, if it has some."""
    published.write_mini(tmp_path)
    published.write_challenge(tmp_path)
    small = both(prepare(settings(), Options(data_dir=tmp_path)))
    large = both(prepare(settings(), Options(data_dir=tmp_path, full_train=True)))
    assert [len(read(file)) for file in (*small, *large)] == [4, 2, 6, 6]
    assert [files[0].parent.name for files in (small, large)] == ["docvqa", "docvqa-full"]


def test_a_run_keeps_its_own_files(tmp_path: Path, published: ModuleType) -> None:
    own = (Path("mine.jsonl"),)
    run = Run(data=Data(train=own, eval=own))
    assert prepare(run, Options(data_dir=tmp_path / "nowhere")) is run
    published.write_mini(tmp_path)
    prepared = prepare(Run(data=Data(train=own)), Options(data_dir=tmp_path))
    assert both(prepared) == (*own, tmp_path / "phi3v" / "docvqa" / "test.jsonl")


def test_what_is_missing_is_named(tmp_path: Path, published: ModuleType) -> None:
    options = Options(data_dir=tmp_path, full_train=True)
    with pytest.raises(InputError, match=r"holds no DocVQA: expected data/train-.* or docvqa/train-.*; found nothing"):
        prepare(settings(), options)
    published.write_mini(tmp_path)
    with pytest.raises(InputError, match=r"--full-train: .* holds only the mini set"):
        prepare(settings(), options)
    shutil.rmtree(tmp_path / "data")
    write_pages(published, tmp_path)
    with pytest.raises(InputError, match=r"holds only HuggingFaceM4/the_cauldron, docvqa: give --eval, or add"):
        prepare(settings(), options)
    own = (Path("mine.jsonl"),)
    assert both(prepare(Run(data=Data(eval=own)), options)) == (tmp_path / "phi3v/docvqa-full/train.jsonl", *own)


def test_another_subset_of_the_cauldron_is_refused(tmp_path: Path, published: ModuleType) -> None:
    published.write_cauldron(tmp_path, "hateful_memes", [([published.picture(0)], [("hateful?", "No.")])], num_shards=1)
    with pytest.raises(InputError, match=r"holds no DocVQA.* found hateful_memes/"):
        prepare(settings(), Options(data_dir=tmp_path, full_train=True))
    with pytest.raises(InputError, match=r"row 0: 1 images from hatefulmemes, so this is not the Cauldron's docvqa"):
        prepare(Run(data=Data(eval=Path("x"))), Options(data_dir=tmp_path / "hateful_memes"))
    assert not list((tmp_path / "hateful_memes" / "phi3v").glob("docvqa*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[1].update(answers=["", " "]), "train_v1.0_withQT.json: question 1 has no answer"),
        (lambda data: data[1].pop("answers"), "train_v1.0_withQT.json, question 1: there is no 'answers' in it"),
        (
            lambda data: data[1].update(image="documents/none.png"),
            "1 of its 4 images are nowhere in .*, like none.png",
        ),
        (lambda data: data.append("x"), "question 6: there is no 'questionId' in it"),
        (lambda data: data[1].update(answers=[7, None]), "train_v1.0_withQT.json: question 1 has no answer"),
        (lambda data: data[1].update(answers=None), "train_v1.0_withQT.json, question 1: answers is None, which it"),
        (lambda data: data[1].update(image=["a.png"]), r"question 1: image is \['a.png'\], which it cannot be"),
    ],
)
def test_damaged_annotations(
    change: Callable[[Any], None], message: str, tmp_path: Path, published: ModuleType
) -> None:
    published.write_challenge(tmp_path)
    file = tmp_path / "train_v1.0_withQT.json"
    content = json.loads(file.read_text())
    change(content["data"])
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        prepare(settings(), Options(data_dir=tmp_path))
    assert not list((tmp_path / "phi3v").glob("docvqa*"))


def test_from_the_hub(tmp_path: Path, published: ModuleType, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pages(published, tmp_path / "hub" / "the_cauldron")
    published.write_mini(tmp_path / "hub" / "docvqa_1200_examples")
    asked_for = []

    def snapshot_download(repository: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked_for.append((repository, repo_type, allow_patterns))
        return str(tmp_path / "hub" / repository.partition("/")[2])

    monkeypatch.setattr("phi3v.data.hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    small = both(prepare(settings()))
    large = both(prepare(settings(), Options(full_train=True)))
    assert small[0] == Path("data/docvqa/train.jsonl")
    assert [len(read(file)) for file in (*small, *large)] == [4, 2, 9, 2]
    mini, cauldron = (docvqa.MINI, "dataset", ["data/*"]), (docvqa.CAULDRON, "dataset", ["docvqa/*"])
    assert asked_for == [mini, mini, cauldron]
    prepare(settings())
    assert len(asked_for) == 3  # what is converted needs no network


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        InputError, match=r"nielsr/docvqa_1200_examples cannot be read from the Hub .*--data-dir"
    ) as error:
        prepare(settings())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("data/docvqa"))

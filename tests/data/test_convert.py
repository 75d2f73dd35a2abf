"""Other people's layouts, in the very form they are published in, and what comes of each."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.data import writer as room
from phi3v.data.check import check
from phi3v.data.convert import convert
from phi3v.data.layouts import Format
from phi3v.data.layouts.source import Reading
from phi3v.data.schema import read_jsonl
from phi3v.data.video import sample_frames


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with pictures a.png to e.png in pictures/, and one that is none."""
    folder = tmp_path / "source"
    (folder / "pictures").mkdir(parents=True)
    for name in "abcde":
        Image.new("RGB", (40, 30), (ord(name), 0, 0)).save(folder / f"pictures/{name}.png")
    (folder / "pictures/broken.png").write_bytes(b"no picture")
    return folder


def written(out: Path, name: str = "train") -> list[dict[str, Any]]:
    """The lines of a file, which must be fit for training."""
    file = out / f"{name}.jsonl"
    assert check(file, num_workers=0).problems == ()
    return [json.loads(line) for line in file.read_text().splitlines()]


def turns(out: Path) -> list[list[tuple[Any, ...]]]:
    return [[(*t["images"], t["user"], t["assistant"]) for t in line["conversations"]] for line in written(out)]


SPLITS = ("train", "val")


def left_out(out: Path) -> list[str]:
    file = out / "not_converted.txt"
    return file.read_text().splitlines() if file.exists() else []


def say(*texts: str) -> list[dict[str, str]]:
    """LLaVA's messages, the user first."""
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def converted(
    source: Path, records: Sequence[Any], format: Format = "llava", reading: Reading = Reading(), **flags: Any
) -> Path:
    file = source / "data.json"
    file.write_text(json.dumps(records, indent=2))
    convert(format, file, out=source.parent / "out", reading=reading, progress=False, **flags)
    return source.parent / "out"


def test_llava(source: Path) -> None:
    out = converted(
        source,
        [
            {
                "id": "000000033471",
                "image": "pictures/a.png",
                "conversations": say("<image>\nWhat?", "Red.", "Why?", "So."),
            },
            {"id": 7, "image": "pictures/a.png", "conversations": say("And this?\n<image>", "Red, too.")},
            {"id": "text", "conversations": say("Hello?", "Hi.")},
            {"image": "pictures/b.png", "conversations": say("No tag at all", "Then it comes first.")},
        ],
    )
    assert [line["id"] for line in written(out)] == ["000000033471", "7", "text", "data-4"]
    assert {line["source"] for line in written(out)} == {"data"}
    assert turns(out) == [
        [("pictures/a.png", "<|image_1|>\nWhat?", "Red."), ("Why?", "So.")],
        [("pictures/a.png", "And this?\n<|image_1|>", "Red, too.")],
        [("Hello?", "Hi.")],
        [("pictures/b.png", "No tag at all", "Then it comes first.")],
    ]
    assert left_out(out) == []
    assert sorted(path.name for path in (out / "images/pictures").iterdir()) == ["a.png", "b.png"]
    assert (out / "images/pictures/a.png").read_bytes() == (source / "pictures/a.png").read_bytes()
    assert (out / "images/pictures/a.png").stat().st_nlink == 2, "a second name, no second file"


def test_sharegpt(source: Path) -> None:
    """With several images, images in several turns, a system text, and the roles of other tools."""
    pictures = [f"pictures/{name}.png" for name in "abc"]
    system = [{"from": "system", "value": "Be brief."}]
    out = converted(
        source,
        [
            {"conversations": say("<image>, <image>?", "No.", "<image>", "Yes."), "images": pictures},
            {"conversations": [*system, *say("<image>Which?", "That.")], "images": pictures[:1]},
            {
                "messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}],
                "images": ["pictures/d.png"],
            },
        ],
        "sharegpt",
    )
    assert turns(out) == [
        [
            ("pictures/a.png", "pictures/b.png", "<|image_1|>, <|image_2|>?", "No."),
            ("pictures/c.png", "<|image_1|>", "Yes."),
        ],
        [("pictures/a.png", "<|image_1|>Which?", "That.")],
        [("pictures/d.png", "<|image_1|>a", "b")],
    ]
    assert [line.get("system") for line in written(out)] == [None, "Be brief.", None]


def test_messages_with_parts(source: Path) -> None:
    def ask(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": [text("Yes.")]}]

    def text(value: str) -> dict[str, str]:
        return {"type": "text", "text": value}

    here = str(source / "pictures/c.png")
    records = [
        {"messages": ask({"type": "image", "text": None}, text("What?")), "images": ["pictures/a.png"]},
        {"messages": ask({"type": "image", "image": "pictures/b.png"}, {"type": "image", "path": here}, text("Same?"))},
        {"messages": ask(text("See "), {"type": "image_url", "image_url": {"url": f"file://{here}"}}, text("\nthere"))},
        {"messages": ask(text("No image"))},
        {
            "messages": ask({"type": "image", "image": {"path": "pictures/d.png"}}, {"type": "image"}),
            "images": ["pictures/e.png"],
        },
    ]
    assert turns(converted(source, records, "messages")) == [
        [("pictures/a.png", "<|image_1|>\nWhat?", "Yes.")],
        [("pictures/b.png", "pictures/c.png", "<|image_1|><|image_2|>\nSame?", "Yes.")],
        [("pictures/c.png", "See <|image_1|>\nthere", "Yes.")],
        [("No image", "Yes.")],
        [("pictures/d.png", "pictures/e.png", "<|image_1|><|image_2|>", "Yes.")],
    ]


def test_lines_instead_of_an_array(source: Path) -> None:
    file = source / "data.jsonl"
    good = json.dumps({"image": "a.png", "conversations": say("What?", "Red.")})
    file.write_text(f"\ufeff{good}\n\n{{broken\n{good}\n")
    convert("llava", file, out=source / "out", image_root=source / "pictures", progress=False)
    assert turns(source / "out") == [[("a.png", "What?", "Red.")]] * 2
    assert [line["id"] for line in written(source / "out")] == ["data-1", "data-3"]
    (reason,) = left_out(source / "out")
    assert reason.startswith(f"{file}:3: not JSON: ")


GOOD = {"image": "pictures/a.png", "conversations": say("What?", "Red.")}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**GOOD, "conversations": say("<image><image>", "x")}, "2 <image> tags, 1 images"),
        ({**GOOD, "conversations": say("<image>", "x", "<image>", "y")}, "2 <image> tags, 1 images"),
        ({**GOOD, "conversations": say("What?", "this: <image>")}, "only the user shows images"),
        ({**GOOD, "conversations": say("What?")}, "the last question has no answer"),
        ({**GOOD, "conversations": say("What?", "x", "Why?")}, "the last question has no answer"),
        ({**GOOD, "conversations": say("What?", " ")}, "turn 1: the answer is missing"),
        ({**GOOD, "conversations": say("What?", "x")[::-1]}, "a message of 'assistant' out of turn"),
        ({**GOOD, "conversations": [{"from": "tool", "value": "x"}]}, "a message of 'tool' out of turn"),
        ({**GOOD, "conversations": []}, "conversations, messages or question is missing"),
        ({**GOOD, "conversations": "x"}, "conversations cannot be a string"),
        ({**GOOD, "conversations": ["x"]}, "a message cannot be a string"),
        ({**GOOD, "conversations": [{"from": "human"}]}, "value or content cannot be null"),
        ({**GOOD, "conversations": [{"from": "human", "value": None}]}, "value or content cannot be null"),
        ({**GOOD, "conversations": [{"from": "human", "value": [{"type": "audio"}]}]}, "a part of type 'audio'"),
        ({**GOOD, "conversations": say("<|image_2|>?", "x")}, "tags with the numbers 2, 1 images"),
        (
            {**GOOD, "conversations": say("<image1> <image1>", "x"), "image": ["a", "b"]},
            "a tag stands twice: 1, 1",
        ),
        ({**GOOD, "conversations": say("<image1> <image3>", "x"), "image": ["a", "b"]}, "the numbers 1, 3, 2 images"),
        ({**GOOD, "conversations": say("<bbox>?", "x")}, "<bbox> stands for something that is not converted"),
        ({**GOOD, "image": "pictures/none.png"}, "no such image"),
        ({**GOOD, "image": "pictures/broken.png"}, "broken.png: "),
        ({**GOOD, "image": "../out.png"}, "leads out of the image root"),
        (
            {**GOOD, "image": "https://example.org/a.png"},
            "https://example.org/a.png: a web address (--download fetches it)",
        ),
        ({**GOOD, "image": {"bytes": "x"}}, "an image in base64 that is damaged"),
        ({**GOOD, "image": {"bytes": "aGVsbG8="}}, "unreadable image"),
        ({**GOOD, "image": {"file": "x"}}, "an image with the keys 'file', none of which is known"),
        ({**GOOD, "image": 7}, "an image cannot be a number"),
        (
            {**GOOD, "image": "/9j/4AAQ" * 200},
            "'/9j/4AAQ/9j/4AAQ/9j/4AAQ/9j/4A'... is no path. If it is base64, begin it with",
        ),
        ({**GOOD, "image2": "pictures/b.png"}, "image2 holds another image (--ignore image2 drops it)"),
        (
            {"conversations": say("What?", "x"), "scan_id": "a.png"},
            "scan_id holds an image: name it with --columns image=",
        ),
        ({"conversations": say("pictures/a.png\nWhat?", "x")}, "the text has a line 'pictures/a.png', and no image"),
        ({"conversations": say("<|vision_start|><|image_pad|><|vision_end|>?", "x")}, "1 <image> tags, 0 images"),
        ({**GOOD, "video": "a.mp4"}, "video cannot be converted (--ignore video drops it)"),
        ({**GOOD, "tools": '[{"name": "f"}]'}, "tools cannot be converted"),
        ({**GOOD, "objects": {"bbox": [[1, 2, 3, 4]]}}, "objects cannot be converted"),
        ({**GOOD, "rejected_response": "Blue."}, "rejected_response cannot be converted"),
        ({**GOOD, "kto_tag": False}, "kto_tag is false: the answer is a bad example"),
        (
            {**GOOD, "conversations": [*say("a"), {"from": "gpt", "value": "b", "weight": 0.5}]},
            "an answer of weight 0.5: ",
        ),
        ({**GOOD, "conversations": [*say("a"), {"from": "gpt", "value": "b", "loss": False}]}, "no turn carries loss"),
        (
            {**GOOD, "conversations": [*say("a"), {"from": "gpt", "value": "b", "tool_calls": [1]}]},
            "messages.tool_calls ",
        ),
        ({"image": "pictures/a.png"}, "conversations, messages or question is missing"),
        (7, "a record cannot be a number"),
    ],
)
def test_what_cannot_be_converted_is_listed(source: Path, record: Any, reason: str, capsys) -> None:
    out = converted(source, [GOOD, record, GOOD])
    assert len(written(out)) == 2
    (listed,) = left_out(out)
    assert listed.startswith(f"{source / 'data.json'}, item 2: ")
    assert reason in listed
    printed = capsys.readouterr().out
    assert listed in printed
    assert f"1  {out / 'not_converted.txt'}" in printed
    assert f"2  {out / 'train.jsonl'}" in printed


NAMED = ("images", "image", "Image", "img", "imgs", "image_path", "image_paths", "image_file", "image_url", "photo")
NAMED += ("file_name", "filename", "media", "path")


@pytest.mark.parametrize("key", NAMED)
def test_an_image_under_whatever_key(source: Path, key: str) -> None:
    named = {key: ["pictures/a.png"] if key.endswith("s") else "pictures/a.png"}
    messages = [{"role": "user", "content": "What?", **named}, {"role": "assistant", "content": "Red."}]
    out = converted(source, [{"conversations": say("What?", "Red."), **named}, {"messages": messages}])
    assert turns(out) == [[("pictures/a.png", "What?", "Red.")], [("pictures/a.png", "<|image_1|>\nWhat?", "Red.")]]
    assert left_out(out) == []


TAGS = ("<image>", "<Image>", "<IMG>", "<ImageHere>", "[IMG]", "<|image|>", "<|image_pad|>", "<image_placeholder>")
TAGS += (
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<start_of_image>",
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>",
    "<image_soft_token>",
)
TAGS += ("<image{}>", "<image {}>", "<image_{}>", "<|image_{}|>", "<|vision_start|>", "(<image>./</image>)")


@pytest.mark.parametrize("tag", TAGS)
def test_the_tag_of_whatever_model(source: Path, tag: str) -> None:
    said = say(f"{tag.format(1)}What?", "Red.", f"And {tag.format(2)}?", "Blue.")
    out = converted(source, [{"conversations": said, "images": ["pictures/a.png", "pictures/b.png"]}])
    expected = [("pictures/a.png", "<|image_1|>What?", "Red."), ("pictures/b.png", "And <|image_1|>?", "Blue.")]
    assert turns(out) == [expected]


def test_numbers_say_which_image_is_meant(source: Path) -> None:
    pictures = ["pictures/a.png", "pictures/b.png"]
    named = {"<image_00>": pictures[0], "<image_01>": pictures[1]}
    out = converted(
        source,
        [
            {"conversations": say("<image2> or <image1>?", "x"), "images": pictures},
            {"conversations": say("<image_01>?", "x", "<image_00>?", "y"), "image": named},
            {"conversations": say("<image 1>?", "x", "<image 1>?", "y"), "images": pictures},
        ],
    )
    assert turns(out) == [
        [(*pictures[::-1], "<|image_1|> or <|image_2|>?", "x")],
        [(pictures[1], "<|image_1|>?", "x"), (pictures[0], "<|image_1|>?", "y")],
        [(pictures[0], "<|image_1|>?", "x"), (pictures[1], "<|image_1|>?", "y")],
    ]


INLINE = (
    "<img>{}</img>",
    '<img src="{}" width=9/>',
    "![a box]({})",
    "<|vision_start|>{}<|vision_end|>",
    "<image>{}</image>",
)


@pytest.mark.parametrize("form", [*INLINE, "{{<image>{}}}"])
@pytest.mark.parametrize("listed", [{}, {"image": "pictures/a.png"}])
def test_images_named_inside_the_text(source: Path, form: str, listed: dict[str, str]) -> None:
    said = say(f"Picture 1: {form.format('pictures/a.png')}\nWhat?", "Red.")
    assert turns(converted(source, [{"conversations": said, **listed}])) == [
        [("pictures/a.png", "Picture 1: <|image_1|>\nWhat?", "Red.")]
    ]


def test_a_system_text_and_answers_without_loss(source: Path) -> None:
    said = say("What?", "A draft.", "Again.", "Red.")
    records = [
        {
            "system": "Be brief.",
            "conversations": [said[0], {**said[1], "weight": 0}, said[2], {**said[3], "loss": True}],
        },
        {"system_prompt": "Be", "messages": [{"role": "system", "content": "brief."}, *said]},
    ]
    first, second = written(converted(source, records))
    assert (first["system"], second["system"]) == ("Be brief.", "Be\nbrief.")
    assert [turn.get("loss", True) for turn in first["conversations"]] == [False, True]
    assert [turn.get("loss", True) for turn in second["conversations"]] == [True, True]


def test_several_messages_of_the_user_are_joined(source: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "pictures/a.png"}}, "Look closely."]
    said = [
        {"role": "user", "content": "What?"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Red."},
    ]
    out = converted(source, [{"messages": said}])
    assert turns(out) == [[("pictures/a.png", "What?\n<|image_1|>\nLook closely.", "Red.")]]


def test_images_as_bytes_become_files(source: Path) -> None:
    content = (source / "pictures/a.png").read_bytes()
    text = base64.b64encode(content).decode()
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
    said = [{"role": "user", "content": ["What?", url]}, {"role": "assistant", "content": "Red."}]
    out = converted(
        source, [{"messages": said}, {"image": {"bytes": text, "path": None}, "conversations": say("And?", "x")}]
    )
    name = f"{hashlib.sha256(content).hexdigest()[:24]}.png"
    assert turns(out) == [[(name, "What?<|image_1|>", "Red.")], [(name, "And?", "x")]]
    assert (out / "images" / name).read_bytes() == content


def test_what_was_not_used_is_counted(source: Path, capsys) -> None:
    records = [
        {**GOOD, "license": "MIT", "width": 40, "id": "1", "tools": "[]"},
        {**GOOD, "license": "MIT", "id": "2", "objects": [1]},
    ]
    out = converted(source, [*records, {"conversations": say("Hello?", "Hi.")}], reading=Reading(ignore="objects"))
    expected = ["license: 2 records", "width: 1 record", "objects: 1 record"]
    assert (out / "not_used.txt").read_text().splitlines() == expected
    printed = capsys.readouterr().out
    assert all(f"not used  {line}" in printed for line in expected)
    assert "1  of 3 examples without an image" in printed


def test_a_question_that_is_not_asked_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match="--question has no effect: every record has its own question"):
        converted(source, [GOOD], reading=Reading(question="What?"))


def test_questions_and_answers(source: Path, capsys) -> None:
    records = [
        {"image": "pictures/a.png", "query": "What?", "response": "Red.", "history": [["Hello?", "Hi."]]},
        {"Image": "pictures/a.png", "prefix": "<image>What?", "suffix": "Red."},
        {"image": "pictures/a.png", "question": "How many?", "answers": ["2", "2", "two"]},
        {"image": "pictures/a.png", "instruction": "Count.", "input": "The boxes.", "output": 2},
        {"file_name": "pictures/a.png", "text": "A red box."},
        {"photo_id": "pictures/a.png", "q": "What?", "answer": ["Red.", "Pink."]},
    ]
    out = converted(source, records, reading=Reading(columns="image=photo_id,question=q"))
    assert turns(out) == [
        [("pictures/a.png", "Hello?", "Hi."), ("What?", "Red.")],
        [("pictures/a.png", "<|image_1|>What?", "Red.")],
        [("pictures/a.png", "How many?", "2")],
        [("pictures/a.png", "Count.\nThe boxes.", "2")],
        [("pictures/a.png", "Describe the image.", "A red box.")],
        [("pictures/a.png", "What?", "Red.")],
    ]
    assert [line.get("answers") for line in written(out)] == [None, None, ["2", "two"], None, None, ["Red.", "Pink."]]
    assert "1  the question is 'Describe the image.' (--question)" in capsys.readouterr().out


def test_csv(source: Path) -> None:
    file = source / "data.csv"
    file.write_text(
        "\ufeffid,answer,question, image ,note\n"
        'x1,"Red, I think","What\nis ""this""?",pictures/a.png,\n'
        ",No.,Text only?,,\n"
        "x3,too few\n"
        "x4,Yes,Where?,pictures/none.png,\n"
    )
    convert("csv", file, out=source / "out", progress=False)
    assert [line["id"] for line in written(source / "out")] == ["x1", "data-2"]
    assert turns(source / "out") == [
        [("pictures/a.png", 'What\nis "this"?', "Red, I think")],
        [("Text only?", "No.")],
    ]
    few, missing = left_out(source / "out")
    assert few == f"{file}:5: 2 cells, and the first line has 5: id, answer, question, image, note"
    assert missing.startswith(f"{file}:6: ")
    assert "no such image" in missing


def test_tsv_is_separated_by_tabs(source: Path) -> None:
    file = source / "data.tsv"
    file.write_text("image\tquestion\tanswer\npictures/a.png\tRed, or not?\tRed\n")
    convert("csv", file, out=source / "out", progress=False)
    assert turns(source / "out") == [[("pictures/a.png", "Red, or not?", "Red")]]


def test_tables_of_spreadsheets(source: Path, capsys) -> None:
    text = "image;question;answer\npictures/a.png;Größe, Farbe?;grün; gelb\npictures/b.png;Größe?;klein\n"
    (source / "data.csv").write_bytes(text.encode("cp1252"))
    convert("csv", source / "data.csv", out=source / "out", progress=False)
    assert turns(source / "out") == [[("pictures/b.png", "Größe?", "klein")]]
    assert left_out(source / "out") == [
        f"{source}/data.csv:2: 4 cells, and the first line has 3: image, question, answer"
    ]
    assert "a table in cp1252, separated by ';' (--encoding, --delimiter)" in capsys.readouterr().out
    (source / "data.csv").write_bytes("image,question,answer\npictures/a.png,Größe?,klein\n".encode("utf-16"))
    convert("csv", source / "data.csv", out=source / "utf-16", progress=False)
    assert turns(source / "utf-16") == [[("pictures/a.png", "Größe?", "klein")]]
    with pytest.raises(InputError, match=r"data\.csv:1: not in utf-8: name its --encoding"):
        convert("csv", source / "data.csv", out=source / "no", reading=Reading(encoding="utf-8"))
    (source / "data.csv").write_text("image,question,image\n")
    with pytest.raises(InputError, match=r"data\.csv:1: two columns are named 'image'"):
        convert("csv", source / "data.csv", out=source / "no")


def folders(root: Path, *places: str) -> Path:
    for number, place in enumerate(places):
        (root / place).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / place / "1.png")
    return root


@pytest.mark.parametrize(
    ("splits", "names"),
    [
        (("Training", "Testing"), {"train", "test"}),
        (("train2017", "val2017"), {"train", "val"}),
        (("training_set", "test_set"), {"train", "test"}),
        (("seg_train", "seg_test"), {"train", "test"}),
        (("data/train", "data/validation"), {"train", "val"}),
        (("trainSet", "holdout"), {"train", "test"}),
        (("split_train",), {"train"}),
    ],
)
def test_splits_are_no_classes(tmp_path: Path, splits: tuple[str, ...], names: set[str]) -> None:
    places = [f"{split}/{name}" for split in splits for name in ("cats", "dogs")]
    convert("imagefolder", folders(tmp_path / "all", *places), out=tmp_path / "out", progress=False)
    assert {file.stem for file in (tmp_path / "out").glob("*.jsonl")} == names
    for name in names:
        answers = [line["conversations"][0]["assistant"] for line in written(tmp_path / "out", name)]
        assert answers == ["cats", "dogs"]


def test_what_is_neither_a_split_nor_a_class(tmp_path: Path) -> None:
    root = folders(
        tmp_path / "all", "seg_train/a", "seg_train/b", "seg_test/a", "seg_pred", "__MACOSX/a", ".git/a", "@eaDir"
    )
    convert("imagefolder", root, out=root / "out", progress=False)
    convert("imagefolder", root, out=tmp_path / "again", progress=False)  # without what was written the first time
    for out in (root / "out", tmp_path / "again"):
        assert [len(written(out, split)) for split in ("train", "test")] == [2, 1]
        assert left_out(out) == [f"{root / 'seg_pred'}: it is neither a class, with something in it, nor a split"]


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    root = folders(tmp_path / "all", "cats/more", "dogs")
    (root / "dogs/linked").symlink_to(root / "cats/more")
    (root / "pets").symlink_to(root / "cats")
    convert("imagefolder", root, out=tmp_path / "out", progress=False)
    assert sorted(line["conversations"][0]["assistant"] for line in written(tmp_path / "out")) == [
        *("cats", "dogs", "dogs", "pets")
    ]


def test_classes_with_the_name_of_a_split(tmp_path: Path) -> None:
    convert("imagefolder", folders(tmp_path / "all", "car", "train"), out=tmp_path / "out", progress=False)
    assert [line["conversations"][0]["assistant"] for line in written(tmp_path / "out")] == ["car", "train"]


def test_a_source_with_a_validation_split_is_not_split_again(tmp_path: Path) -> None:
    root = folders(tmp_path / "all", "train/a", "train/b", "val/a")
    with pytest.raises(InputError, match=r"--val-fraction has no effect: .*all has a validation split"):
        convert("imagefolder", root, out=tmp_path / "out", val_fraction=0.5, progress=False)


def test_imagefolder(tmp_path: Path) -> None:
    for name in ("cats/2.png", "cats/more/1.png", "dogs/1.png", "dogs/.hidden.png", ".cache/1.png"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "classes" / name)
    (tmp_path / "classes/empty").mkdir()
    (tmp_path / "classes/dogs/notes.txt").write_text("good dogs")
    convert("imagefolder", tmp_path / "classes", out=tmp_path / "out", progress=False)
    question = "Classify the image into one of the following classes: cats, dogs."
    assert turns(tmp_path / "out") == [
        [("cats/2.png", question, "cats")],
        [("cats/more/1.png", question, "cats")],
        [("dogs/1.png", question, "dogs")],
    ]
    empty, notes = left_out(tmp_path / "out")
    assert empty == f"{tmp_path / 'classes/empty'}: it is neither a class, with something in it, nor a split"
    assert notes.startswith(f"{tmp_path / 'classes/dogs/notes.txt'}: ")
    convert(
        "imagefolder",
        tmp_path / "classes",
        out=tmp_path / "asked",
        reading=Reading(question="Cat or dog?"),
        progress=False,
    )
    assert {line[0][1] for line in turns(tmp_path / "asked")} == {"Cat or dog?"}


def test_video_folder(make_video: Callable[..., Path], tmp_path: Path) -> None:
    for name, num_frames in {"up/a.mkv": 9, "up/a.avi": 4, "down/a.mkv": 5, "down/short.mkv": 2}.items():
        make_video(tmp_path / "videos" / name, num_frames)
    convert("video-folder", tmp_path / "videos", out=tmp_path / "out", num_frames=3, progress=False)
    question = "Classify the video into one of the following classes: down, up."
    assert turns(tmp_path / "out") == [
        [(*(f"down/a.mkv.{k}.jpg" for k in range(3)), question, "down")],
        [(*(f"up/a.avi.{k}.jpg" for k in range(3)), question, "up")],
        [(*(f"up/a.mkv.{k}.jpg" for k in range(3)), question, "up")],
    ]
    frames = sample_frames(tmp_path / "videos/up/a.mkv", 3)
    for k, frame in enumerate(frames):
        written_frame = np.asarray(Image.open(tmp_path / f"out/images/up/a.mkv.{k}.jpg"), dtype=float)
        assert np.abs(written_frame - np.asarray(frame)).mean() < 4, "JPEG"
    assert np.abs(np.asarray(frames[0], dtype=float) - np.asarray(frames[2])).mean() > 8
    (short,) = left_out(tmp_path / "out")
    assert "short.mkv: 2 frames decode, 3 are needed" in short


def test_splits_share_no_image(source: Path) -> None:
    records = [
        {"id": f"{name}{k}", "images": [f"pictures/{name}.png"], "conversations": say(f"{k}?", "x")}
        for name in "abcde"
        for k in range(4)
    ]
    out = converted(source, records, "sharegpt", val_fraction=0.4, seed=3)
    sides = [written(out, name) for name in ("train", "val")]
    assert [len(side) for side in sides] == [12, 8]
    shown = [{image for line in side for turn in line["conversations"] for image in turn["images"]} for side in sides]
    assert not shown[0] & shown[1]
    assert [line["id"] for line in sides[0]] == sorted(line["id"] for line in sides[0]), "the order is the source's"


def test_copies_of_an_image_stay_on_one_side_and_nearly_equal_ones_are_named(source: Path, capsys) -> None:
    pictures, rng = source / "pictures", np.random.default_rng(0)
    for k in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40, 30), Image.Resampling.BICUBIC).save(pictures / f"{k}.png")
        (pictures / f"copy-{k}.png").write_bytes((pictures / f"{k}.png").read_bytes())
        if k < 2:
            Image.open(pictures / f"{k}.png").save(pictures / f"{k}.jpg", quality=80)
    records = [
        {"image": f"pictures/{path.name}", "conversations": say(f"{path.name}?", "x")}
        for path in sorted(pictures.glob("*[0-9].*"))
    ]
    warned = set()
    for seed in range(4):
        out = converted(source, records, val_fraction=0.25, seed=seed)
        train, val = ({line["conversations"][0]["images"][0] for line in written(out, name)} for name in SPLITS)
        assert (len(train), len(val)) == (14, 4)
        contents = [{(out / "images" / image).read_bytes() for image in side} for side in (train, val)]
        assert not contents[0] & contents[1]
        apart = any((f"pictures/{k}.png" in val) != (f"pictures/{k}.jpg" in val) for k in range(2))
        assert ("look nearly like one of train.jsonl" in " ".join(capsys.readouterr().out.split())) == apart
        warned.add(apart)
        shutil.rmtree(out)
    assert warned == {False, True}


def test_every_class_has_examples_to_train_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, number in {"common": 16, "rare": 4, "single": 1}.items():
        (tmp_path / "source" / name).mkdir(parents=True)
        for k in range(number):
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(tmp_path / "source" / name / f"{k}.png")
    for seed in range(4):
        out = tmp_path / f"out{seed}"
        convert("imagefolder", tmp_path / "source", out=out, val_fraction=0.5, seed=seed, progress=False)
        sides = [Counter(line["conversations"][0]["assistant"] for line in written(out, name)) for name in SPLITS]
        assert sides[0] == {"common": 8, "rare": 2, "single": 1}
        assert sides[1] == {"common": 8, "rare": 2}


@pytest.mark.parametrize(
    ("format", "flags", "message"),
    [
        ("llava", {"val_fraction": 1.0}, "--val-fraction is 1.0, it must be less than 1"),
        ("llava", {"num_frames": 0}, "--num-frames is 0, it must be at least 1"),
        (
            "llava",
            {"reading": Reading(columns="image")},
            "--columns image: it must be as in image=photo,question=q,answer=a",
        ),
        ("csv", {"reading": Reading(delimiter="::")}, "--delimiter '::': it must be one character"),
        ("imagefolder", {"reading": Reading(question="<image>?")}, "--question is without <image>"),
        ("imagefolder", {"source": "folds"}, "fold1, fold2 hold the same folders, so they are no classes"),
        ("imagefolder", {"source": "yolo"}, "yolo holds images and labels: boxes (YOLO) are not converted"),
        ("imagefolder", {"image_root": Path(".")}, "--image-root has no effect on a folder"),
        ("llava", {"image_root": Path("nowhere")}, "--image-root nowhere: no such folder"),
        ("csv", {"source": "none.csv"}, "none.csv: no such file or folder"),
        ("imagefolder", {"source": "none"}, "none: no such file or folder"),
        ("csv", {}, "data.json: nothing to convert; it is empty"),
        ("llava", {}, "data.json: nothing to convert; it is empty"),
        ("imagefolder", {"source": "pictures"}, "pictures: there are no folders in it, one a class"),
        ("imagefolder", {"source": "splits"}, "splits/train is a split without folders of classes in it"),
    ],
)
def test_refusals_leave_nothing_behind(source: Path, format: Any, flags: dict[str, Any], message: str) -> None:
    (source / "data.json").write_text("[]")
    for name in ("splits/train", "splits/val", "yolo/images/train", "yolo/labels/train"):
        (source / name).mkdir(parents=True)
    folders(source, "folds/fold1/a", "folds/fold1/b", "folds/fold2/a", "folds/fold2/b")
    given = source / flags.pop("source", "data.json" if format in ("llava", "csv") else "pictures")
    with pytest.raises(InputError) as error:
        convert(format, given, out=source.parent / "out", **flags)
    assert message in str(error.value)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_nothing_is_written_over(source: Path) -> None:
    out = converted(source, [GOOD])
    before = (out / "train.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"out is not empty: choose another folder, or remove it"):
        converted(source, [GOOD, GOOD])
    assert (out / "train.jsonl").read_bytes() == before


def test_a_second_process_waits_and_replaces_nothing_nor_is_the_current_folder_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, second, log = room.DatasetWriter.put_image, [], tmp_path / "said"

    def while_another_comes(self: Any, name: str, content: Any) -> str:
        if not second and not (process := os.fork()):  # a lock does not bind the process that holds it
            try:
                with open(log, "w") as stream, contextlib.redirect_stdout(stream):
                    converted(source, [{**GOOD, "id": "another"}])
            except InputError as error:
                log.with_suffix(".error").write_text(str(error))
            finally:
                os._exit(0)
        if not second:
            second.append(process)
            for _ in range(6000):
                if log.exists() and "waiting for another process that writes" in log.read_text():
                    break
                time.sleep(0.01)
        return put(self, name, content)

    monkeypatch.setattr(room.DatasetWriter, "put_image", while_another_comes)
    monkeypatch.setattr("phi3v.data.convert.forked_map", lambda function, items, *unused, **also: map(function, items))
    out = converted(source, [GOOD])
    before = (out / "train.jsonl").read_bytes()
    os.waitpid(second[0], 0)
    assert log.with_suffix(".error").read_text().startswith(f"{out} is not empty: choose another folder")
    assert (out / "train.jsonl").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "said", "said.error"}
    monkeypatch.setattr(room.DatasetWriter, "put_image", put)
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    for place in (".", ".."):
        with pytest.raises(InputError, match=rf"^{re.escape(place)} is the current folder, or holds it"):
            convert("llava", source / "data.json", out=Path(place), progress=False)


def test_a_copy_where_no_link_can_be(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*unused: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(room.os, "link", refuse)
    out = converted(source, [GOOD])
    assert (out / "images/pictures/a.png").read_bytes() == (source / "pictures/a.png").read_bytes()
    assert (out / "images/pictures/a.png").stat().st_nlink == 1


def test_a_full_disk_leaves_nothing_behind(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*unused: Any) -> Callable[..., None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room.os, "link", full)
    monkeypatch.setattr(room.shutil, "copyfile", full)
    with pytest.raises(InputError, match=r"cannot write .*out: .*No space left on device"):
        converted(source, [GOOD])
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_what_is_written_can_be_read(source: Path) -> None:
    out = converted(source, [GOOD, {**GOOD, "image": "pictures/b.png"}], val_fraction=0.5)
    examples = [*read_jsonl(out / "train.jsonl"), *read_jsonl(out / "val.jsonl")]
    assert sorted(Path(image).name for example in examples for image in example.images) == ["a.png", "b.png"]

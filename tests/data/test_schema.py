from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from phi3v.base.errors import InputError
from phi3v.data.encode import Turn
from phi3v.data.schema import Notes, image_resolver, lines, parse, read_jsonl

GOOD = {"id": "1", "source": "s", "conversations": [{"images": ["a.png"], "user": "what", "assistant": "red"}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "outside.png").touch()
    return tmp_path / "train.jsonl"


def write(data: Path, *records: object) -> Path:
    data.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return data


def problems(line: object, data: Path) -> list[str]:
    """All problems and warnings of one line."""
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    notes = Notes()
    parse(raw, "here", image_resolver(data, None), notes)
    return notes.problems + notes.warnings


def turn(**fields: object) -> dict[str, object]:
    return {"user": "what", "assistant": "red", **fields}


def test_the_guide_s_format(data: Path) -> None:
    two = {
        "id": "2",
        "conversations": [turn(images=["a.png", "sub/b.png"]), turn(user="and", assistant="no")],
        "answers": ["no", "none"],
        "group": "dev-1-0",
        "closed_turns": True,
        "system": "Be brief.",
    }
    two["conversations"][0]["loss"] = False  # type: ignore[index]
    write(data, GOOD, "", two, "   ")
    first, second = read_jsonl(data)
    root = data.parent.resolve() / "images"
    assert first.turns == (Turn(user="what", assistant="red", images=(str(root / "a.png"),)),)
    assert (first.id, first.source, first.where, first.answers) == ("1", "s", f"{data}:1", ("red",))
    assert (second.system, [turn.loss for turn in second.turns]) == ("Be brief.", [False, True])
    assert second.images == (str(root / "a.png"), str(root / "sub" / "b.png"))
    assert (second.where, second.source, second.answers) == (f"{data}:3", "", ("no", "none"))
    assert second.turns[1] == Turn(user="and", assistant="no", images=())
    assert (first.group, first.closed_turns, second.group, second.closed_turns) == ("", False, "dev-1-0", True)


def test_image_root(data: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    write(data, GOOD)
    (example,) = read_jsonl(data, tmp_path / "elsewhere")
    assert example.images == (str(tmp_path.resolve() / "elsewhere" / "a.png"),)
    with pytest.raises(InputError, match=r"--image-root .*nowhere: no such folder"):
        read_jsonl(data, tmp_path / "nowhere")


def test_no_images_need_no_image_root(tmp_path: Path) -> None:
    data = write(tmp_path / "text.jsonl", {"id": "1", "conversations": [turn()]})
    assert read_jsonl(data)[0].images == ()
    write(data, GOOD)
    with pytest.raises(InputError, match=r"text.jsonl:1: turn 1: the image root .* is no folder \(--image-root\)"):
        read_jsonl(data)


def test_paths_stay_in_the_root(data: Path) -> None:
    root = data.parent / "images"
    (root / "out.png").symlink_to(data.parent / "outside.png")
    (root / "out").symlink_to(data.parent)
    (root / "in.png").symlink_to(root / "sub" / "b.png")
    (data.parent / "images_too").mkdir()
    resolve = image_resolver(data, None)
    outside = str(data.parent / "outside.png")
    for name in (
        "../outside.png",
        outside,
        "out.png",
        "out/outside.png",
        "sub/../../outside.png",
        "../images_too/x",
        ".",
    ):
        with pytest.raises(InputError, match="leads out of the image root"):
            resolve(name)
    assert resolve("in.png") == resolve("sub/b.png") == resolve("./sub/../sub/b.png")
    with pytest.raises(InputError, match="null"):
        resolve("a\0b.png")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"id": "1", }', "not JSON: "),
        (b'{"id": "\xff"}', "not UTF-8"),
        (b'[{"id": "1"},', "Each line must hold one object"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"id": ' + b"1" * 5000 + b"}", "not JSON: "),
        (json.dumps({**GOOD, "id": "\ud800"}).encode(), "surrogate pair"),
        ([GOOD], "must be an object, not a list"),
        ("text", "must be an object, not a string"),
        ({**GOOD, "id": 7}, "id: must be a string, not an integer"),
        ({**GOOD, "id": ""}, "id: is empty"),
        ({"id": "1"}, "conversations: is missing"),
        ({**GOOD, "conversations": []}, "conversations: is empty"),
        ({**GOOD, "conversations": {}}, "conversations: must be a list, not an object"),
        ({**GOOD, "source": None}, "source: must be a string, not null"),
        ({**GOOD, "anwsers": ["no"]}, "unknown key 'anwsers': did you mean 'answers'?"),
        ({**GOOD, "license": "MIT"}, "unknown key 'license' is ignored"),
        ({**GOOD, "conversations": ["hi"]}, "conversations[0]: must be an object, not a string"),
        (
            {**GOOD, "conversations": [turn(), turn(user=True)]},
            "conversations[1].user: must be a string, not true or false",
        ),
        ({**GOOD, "conversations": [turn(image=["a.png"])]}, "turn 1: unknown key 'image': did you mean 'images'?"),
        ({**GOOD, "images": ["a.png"]}, "unknown key 'images' holds an image: it belongs into 'images' of a turn"),
        ({**GOOD, "Image_Path": "a.png"}, "unknown key 'Image_Path' holds an image"),
        ({"id": "1", "conversations": [turn()], "scan": "7/a.JPG"}, "unknown key 'scan' holds an image"),
        ({**GOOD, "scan": "7/a.JPG"}, "unknown key 'scan' is ignored"),
        ({**GOOD, "conversations": [turn(img="a.png")]}, "turn 1: unknown key 'img' holds an image"),
        ({**GOOD, "conversations": [turn(loss=False)]}, "no turn carries loss"),
        ({**GOOD, "conversations": [turn(loss=0)]}, "conversations[0].loss: must be true or false, not an integer"),
        ({**GOOD, "system": ["Be brief."]}, "system: must be a string, not a list"),
        ({**GOOD, "conversations": [{"user": "what"}]}, "turn 1: the answer is missing"),
        ({**GOOD, "conversations": [{"from": "human", "value": "hi"}]}, "LLaVA"),
        ({**GOOD, "conversations": [turn(images="a.png")]}, "conversations[0].images: must be a list, not a string"),
        ({**GOOD, "conversations": [turn(images=[None])]}, "conversations[0].images[0]: must be a string, not null"),
        ({**GOOD, "conversations": [turn(images=["../outside.png"])]}, "leads out of the image root"),
        ({**GOOD, "conversations": [turn(assistant=" \n")]}, "turn 1: the answer is missing"),
        ({**GOOD, "answers": [" "]}, "answers holds a blank text"),
        ({**GOOD, "answers": ["red", 7]}, "answers[1]: must be a string, not an integer"),
    ],
)
def test_what_is_wrong(line: object, expected: str, data: Path) -> None:
    found = problems(line, data)
    assert any(expected in problem for problem in found), found
    assert not any("\n" in problem for problem in found)


def test_every_problem_of_a_line(data: Path) -> None:
    line = {"id": 1, "conversations": [turn(images=["../x", "../y"], assistant=""), {"user": "what"}]}
    assert problems(line, data) == ["id: must be a string, not an integer"]  # with wrong types nothing else is sure
    line["id"] = "1"
    assert len(problems(line, data)) == 4


def test_strict_reading_stops_at_the_first_problem(data: Path) -> None:
    write(data, GOOD, {**GOOD, "license": "MIT"}, "", {**GOOD, "id": 7}, "{")
    with pytest.raises(InputError, match=r"train.jsonl:4: id: must be a string"):
        read_jsonl(data)
    write(data, GOOD, {**GOOD, "conversations": [turn(assistant="")]})
    with pytest.raises(InputError, match=r"train.jsonl:2: turn 1: the answer is missing"):
        read_jsonl(data)


def test_unreadable_files(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.jsonl: No such file"):
        read_jsonl(data)
    with pytest.raises(InputError, match="Is a directory"):
        read_jsonl(tmp_path)
    write(data, "", " ")
    with pytest.raises(InputError, match=r"train.jsonl: no examples"):
        read_jsonl(data)


def test_line_ends_and_byte_order_mark(data: Path) -> None:
    text = json.dumps({**GOOD, "source": "a\u2028b"}, ensure_ascii=False)
    data.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}".encode())
    assert [example.source for example in read_jsonl(data)] == ["a\u2028b"] * 2
    assert len(list(lines(data))) == 2


@pytest.mark.parametrize(
    "last", [{"user": "and"}, {"user": "and", "assistant": None}, {"user": "and", "assistant": " "}]
)
def test_a_prompt_s_last_turn_waits_for_its_answer(data: Path, last: dict[str, object]) -> None:
    line = {"id": "1", "conversations": [turn(), last]}
    write(data, line, {**line, "answers": ["no"]}, GOOD)
    asked, known, answered = read_jsonl(data, prompts=True)
    assert asked.turns == (Turn(user="what", assistant="red"), Turn(user="and", assistant=None))
    assert (asked.answers, known.answers, answered.answers) == ((), ("no",), ("red",))
    with pytest.raises(InputError, match=r"train\.jsonl:1: turn 2: the answer is missing"):
        read_jsonl(data)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"user": "what"}, turn()], "turn 1: the answer is missing"),
        ([{"user": "what", "asistant": "red"}], "turn 1: unknown key 'asistant': did you mean 'assistant'?"),
        ([{"user": "what", "assistant": 5}], "conversations[0].assistant: must be a string or null, not an integer"),
        (["what"], "conversations[0]: must be an object, not a string"),
    ],
)
def test_a_prompt_is_checked_as_everything_else(data: Path, turns: list[object], message: str) -> None:
    write(data, {"id": "1", "conversations": turns})
    with pytest.raises(InputError, match=re.escape(f"train.jsonl:1: {message}")):
        read_jsonl(data, prompts=True)

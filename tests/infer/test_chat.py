"""One question, or a scripted conversation in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.data.encode import Turn
from phi3v.infer import chat as room
from phi3v.infer.chat import chat


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Turn, ...]]]:
    """Types lines into the conversation; gives the list that the turns of every reply will be in."""

    def typed(*lines: str) -> list[tuple[Turn, ...]]:
        left, heard = list(lines), []
        reply = room._reply

        def listening(network, processor, turns, settings):
            said = reply(network, processor, turns, settings)
            heard.append(turns)
            return said

        def read(prompt: object = "") -> str:
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr(room, "_reply", listening)
        monkeypatch.setattr("builtins.input", read)
        return heard

    return typed


@pytest.fixture
def red(tiny_data: Path) -> str:
    return str(tiny_data.parent / "images/red.png")


def answers_of(run: Path) -> dict[str, str]:
    """What the run's final model said, by the id of the example; e0 asks for the colour of the red picture."""
    records = map(json.loads, (run / "predictions.jsonl").read_text().splitlines())
    return {record["id"]: record["prediction"] for record in records}


def test_one_question_gets_one_answer(finished_run: Path, red: str, capsys) -> None:
    chat(str(finished_run), "what is the color", image=(Path(red),), max_new_tokens=6)
    assert capsys.readouterr().out.strip() == answers_of(finished_run)["e0"]


def test_a_conversation_keeps_its_history_until_it_starts_anew(finished_run: Path, red: str, script, capsys) -> None:
    heard = script(f"/image {red}", "what is this", "and is it blue", "/new", "answer briefly", "/quit", "never read")
    chat(str(finished_run), max_new_tokens=12)
    assert [len(turns) for turns in heard] == [1, 2, 1]
    first, second = heard[1]
    assert first == Turn(user="what is this", assistant=first.assistant, images=(red,))
    assert second == Turn(user="and is it blue", assistant=None, images=())
    assert heard[2] == (Turn(user="answer briefly", assistant=None, images=()),)
    said = capsys.readouterr().out
    assert first.assistant
    assert f"you (with 1 picture): {first.assistant}\n" in said


def test_pictures_given_at_the_start_go_with_the_first_message(finished_run: Path, red: str, script) -> None:
    heard = script("what is the color", "and now")
    chat(str(finished_run), image=(Path(red), Path(red)), max_new_tokens=3)
    assert [turn.images for turn in heard[1]] == [(red, red), ()]


@pytest.mark.parametrize("leave", ["/quit", "/exit", None])
def test_there_are_three_ways_out(leave: str | None, finished_run: Path, script) -> None:
    heard = script(*([leave] if leave else []))  # None: Ctrl-D
    chat(str(finished_run))
    assert heard == []


def test_what_cannot_be_asked_does_not_end_the_conversation(
    finished_run: Path, red: str, script, tmp_path: Path, capsys
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    heard = script(
        "/image /no/such/[b]file.png",
        f"/image {tmp_path / 'broken.png'}",
        "/image",
        "/imagine",
        "<|image_1|> without a picture",
        f"/image {red}",
        "<|image_2|> misnamed",
        "<|image_1|>\nwhat is the color",
        "",
    )
    chat(str(finished_run), max_new_tokens=6)
    assert heard == [(Turn(user="<|image_1|>\nwhat is the color", assistant=None, images=(red,)),)]
    said = capsys.readouterr().out
    for words in (
        "/no/such/[b]file.png: no such image",
        "broken.png",
        "prompt has 1 image tags (1), 0 images were given",
    ):
        assert words in said
    assert said.count("/image FILE shows a picture") == 3


def test_a_picture_in_the_home_folder(finished_run: Path, script, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (20, 20)).save(tmp_path / "a b.png")
    heard = script("/image ~/a b.png", "what is this")
    chat(str(finished_run), max_new_tokens=2)
    assert heard[0][0].images == (str(tmp_path / "a b.png"),)


def test_a_missing_picture_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.png: no such image"):
        chat("/no/such/model", "what is it", image=(tmp_path / "nothing.png",))


def test_temperature_makes_answers_vary(finished_run: Path, red: str, capsys) -> None:
    for _ in range(4):
        chat(str(finished_run), "what is the color", image=(Path(red),), max_new_tokens=6, temperature=50.0)
    assert len(set(capsys.readouterr().out.splitlines())) > 1
    with pytest.raises(InputError, match=r"--temperature is -1\.0, it must be at least 0"):
        chat(str(finished_run), "what", temperature=-1.0)

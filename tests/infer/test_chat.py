"""One question, or a scripted conversation in the terminal."""

from __future__ import annotations

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
    """Types lines into the conversation; returns the list to which the turns of every reply are added."""

    def typed(*lines: str) -> list[tuple[Turn, ...]]:
        left, heard = list(lines), []
        reply = room._reply

        def listening(answerer, turns, *how):
            said = reply(answerer, turns, *how)
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


@pytest.fixture
def model(scripted_model_dir: Path) -> str:
    return str(scripted_model_dir)


def test_one_question_gets_one_answer(model: str, red: str, capsys) -> None:
    chat(model, "what is this", image=(Path(red),), max_new_tokens=6)
    assert capsys.readouterr().out == "a red picture\n"


def test_a_run_folder_is_its_final_model(finished_run: Path, capsys) -> None:
    for name in (finished_run, finished_run / "final"):
        chat(str(name), "answer briefly", max_new_tokens=6)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_a_conversation_keeps_its_history_until_a_new_one(model: str, red: str, script, capsys) -> None:
    heard = script(f"/image {red}", "what is this", "and is it blue", "/new", "answer briefly", "/quit", "never read")
    chat(model, max_new_tokens=12)
    assert [len(turns) for turns in heard] == [1, 2, 1]
    first, second = heard[1]
    assert first == Turn(user="what is this", assistant=first.assistant, images=(red,))
    assert second == Turn(user="and is it blue", assistant=None, images=())
    assert heard[2] == (Turn(user="answer briefly", assistant=None, images=()),)
    assert first.assistant == "a red picture"
    said = capsys.readouterr().out
    assert "you (with 1 image): a red picture\n" in said
    assert "you: no\n" in said
    assert "you: yes\n" in said


def test_images_given_at_the_start_go_with_the_first_message(model: str, red: str, script) -> None:
    heard = script("what is the color", "and now")
    chat(model, image=(Path(red), Path(red)), max_new_tokens=3)
    assert [turn.images for turn in heard[1]] == [(red, red), ()]


@pytest.mark.parametrize("leave", ["/quit", "/exit", None])
def test_there_are_three_ways_out(leave: str | None, model: str, script) -> None:
    heard = script(*([leave] if leave else []))  # None: Ctrl-D
    chat(model)
    assert heard == []


def test_what_cannot_be_asked_does_not_end_the_conversation(
    model: str, red: str, script, tmp_path: Path, capsys
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
    chat(model, max_new_tokens=6)
    assert heard == [(Turn(user="<|image_1|>\nwhat is the color", assistant=None, images=(red,)),)]
    said = capsys.readouterr().out
    for words in (
        "/no/such/[b]file.png: no such image",
        "broken.png",
        "prompt has 1 image tags (1), 0 images were given",
    ):
        assert words in said
    assert said.count("/image FILE shows an image") == 3


def test_an_image_in_the_home_folder(model: str, script, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (20, 20)).save(tmp_path / "a b.png")
    heard = script("/image ~/a b.png", "what is this")
    chat(model, max_new_tokens=2)
    assert heard[0][0].images == (str(tmp_path / "a b.png"),)


def test_a_missing_image_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.png: no such image"):
        chat("/no/such/model", "what is it", image=(tmp_path / "nothing.png",))


def test_temperature_makes_answers_vary(model: str, red: str, capsys) -> None:
    for _ in range(4):
        chat(model, "what is the color", image=(Path(red),), max_new_tokens=6, temperature=50.0)
    assert len(set(capsys.readouterr().out.splitlines())) > 1
    with pytest.raises(InputError, match=r"--temperature -1\.0: must be at least 0"):
        chat(model, "what", temperature=-1.0)

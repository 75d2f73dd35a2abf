"""Answers to a file: those of one question at a time, one line each, wherever it is killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.cli import main
from phi3v.data.schema import read_jsonl
from phi3v.infer import predict as room
from phi3v.infer.answering import Answerer, Loading, Scoring, read_questions
from phi3v.infer.predict import predict

FLAGS = {"max_new_tokens": 6, "loading": Loading(dtype="fp32"), "progress": False}


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def write(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a data file of conversations beside the tiny images' folder."""

    def written(*conversations: list[dict[str, Any]]) -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        for picture in (tiny_data.parent / "images").iterdir():
            (tmp_path / "images" / picture.name).write_bytes(picture.read_bytes())
        records = [{"id": f"q{n}", "conversations": turns} for n, turns in enumerate(conversations)]
        file = tmp_path / "asked.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    return written


@pytest.fixture
def page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write after every page: the tiny data has four images, and a text."""
    monkeypatch.setattr(room, "QUESTIONS_AT_ONCE", 0)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint_dir: Path, tiny_data: Path) -> list[dict[str, Any]]:
    """What should come out for the tiny data: every question answered on its own.

    The two most likely tokens are never closer than 8e-4 in their logits, a thousand times what sums in another order
    change.
    """
    answerer = Answerer.load(tiny_checkpoint_dir, FLAGS["loading"])
    return [
        {
            "id": prompt.id,
            "line": int(prompt.where.rpartition(":")[2]),
            "question": prompt.turns[-1].user,
            "prediction": answerer.answers([prompt], Scoring(), max_new_tokens=6)[0]["prediction"],
        }
        for prompt in read_questions(tiny_data, None)
    ]


# -- answers ---------------------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_one_question_at_a_time(
    tiny_checkpoint_dir: Path, tiny_data: Path, expected, tmp_path: Path
) -> None:
    out = predict(str(tiny_checkpoint_dir), tiny_data, out=tmp_path / "deep/answers.jsonl", **FLAGS)
    assert lines_of(out) == expected
    assert {file.name for file in out.parent.iterdir()} == {
        "answers.jsonl",
        "answers.jsonl.settings.json",
        ".answers.jsonl.lock",
    }


def test_questions_need_no_answers(scripted_model_dir: Path, write, tmp_path: Path) -> None:
    data = write(
        [{"images": ["red.png"], "user": "what is the color"}],
        [{"images": ["blue.png"], "user": "what is the color", "assistant": None}],
        [{"images": ["grey.png"], "user": "what is the color", "assistant": " "}],
        [{"images": ["red.png"], "user": "what is this", "assistant": "a red picture"}, {"user": "and is it blue"}],
    )
    out = predict(str(scripted_model_dir), data, out=tmp_path / "out.jsonl", **FLAGS)
    assert [line["prediction"] for line in lines_of(out)] == ["blue", "blue", "blue", "no"]
    assert [(line["id"], line["line"]) for line in lines_of(out)] == [("q0", 1), ("q1", 2), ("q2", 3), ("q3", 4)]
    with pytest.raises(InputError, match=r"asked\.jsonl:1: turn 1: the answer is missing"):
        read_jsonl(data)  # to learn from they are no use


def test_questions_of_a_page_are_answered_together_wherever_they_stand(
    scripted_model_dir: Path, write, tmp_path: Path, page_by_page, tower_calls: list[int]
) -> None:
    asked = ["what is the color", "is this red", "is it light"]
    data = write(*([{"images": [name], "user": text}] for text in asked for name in ("red.png", "blue.png")))
    out = predict(str(scripted_model_dir), data, out=tmp_path / "out.jsonl", **FLAGS)
    assert tower_calls == [1, 1], "each page is seen once"  # in one crop, which is the whole image too
    assert [line["line"] for line in lines_of(out)] == [1, 2, 3, 4, 5, 6]
    said = ["blue", "blue", "a red picture", "a red picture", "", ""]
    assert [line["prediction"] for line in lines_of(out)] == said


def test_the_questions_are_not_held_in_memory(tmp_path: Path) -> None:
    """10 MB of them."""
    data = tmp_path / "many.jsonl"
    lines = (json.dumps({"id": f"q{n}", "conversations": [{"user": f"{n} " * 500}]}) for n in range(5000))
    data.write_text("\n".join(lines))
    tracemalloc.start()
    try:
        asked = room.Asked(data, None, None)
        assert tracemalloc.get_traced_memory()[0] < 2e6
    finally:
        tracemalloc.stop()
    assert asked[4321].id == "q4321"
    assert [len(portion) for portion in room.portions(asked.order, asked.page, 2000)] == [2000, 2000, 1000]


def test_labels_are_scored(scripted_model_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    labels = ("red", "blue", "green", "grey")
    out = predict(str(scripted_model_dir), tiny_data, out=tmp_path / "out.jsonl", labels=labels, limit=5, **FLAGS)
    assert [line["id"] for line in lines_of(out)] == ["e0", "e3", "e6", "e9", "e12"]
    for line in lines_of(out):
        scores = line["label_log_probs"]
        assert tuple(scores) == labels
        assert line["prediction"] == max(scores, key=scores.__getitem__)
    assert [line["prediction"] for line in lines_of(out)[:4]] == ["blue"] * 4
    with pytest.raises(InputError, match="'red' and 'Red' are the same answer"):
        predict(str(scripted_model_dir), tiny_data, out=tmp_path / "other.jsonl", labels=("red", "Red"), **FLAGS)
    assert not list(tmp_path.glob("other*"))


def test_the_command_line(scripted_model_dir: Path, tiny_data: Path, tmp_path: Path, capsys) -> None:
    words = [
        "predict",
        str(scripted_model_dir),
        str(tiny_data),
        "--out",
        str(tmp_path / "out.jsonl"),
        "--max-new-tokens",
        "3",
    ]
    assert main([*words, "--limit", "2", "--dtype", "fp32"]) == 0
    assert main([*words, "--limit", "2", "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert said.count("2 answers in") == 2
    assert "2 of 2 questions are answered already" in said


# -- killed ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(5))
def test_killed_at_any_write_it_goes_on(
    at: int, tiny_checkpoint_dir: Path, tiny_data: Path, expected, tmp_path: Path, monkeypatch, page_by_page
) -> None:
    out, real, writes = tmp_path / "out.jsonl", room.AnswerFile.add, []

    def half(self: Any, lines: list[dict[str, Any]]) -> None:
        if len(writes) == at:
            real(self, lines)
            os.truncate(out, out.stat().st_size - 9)  # of several lines the last, or of one
            raise Killed
        real(self, lines)
        writes.append([line["id"] for line in lines])

    with monkeypatch.context() as patched:
        patched.setattr(room.AnswerFile, "add", half)
        with pytest.raises(Killed):
            predict(str(tiny_checkpoint_dir), tiny_data, out=out, **FLAGS)
    left = list[str]()
    answers = Answerer.answers

    def watched(self: Answerer, prompts: list[Any], *rest: Any, **how: Any) -> Any:
        left.extend(prompt.id for prompt in prompts)
        return answers(self, prompts, *rest, **how)

    monkeypatch.setattr(Answerer, "answers", watched)
    predict(str(tiny_checkpoint_dir), tiny_data, out=out, **FLAGS)
    assert lines_of(out) == expected
    assert not {name for names in writes for name in names} & set(left), "what is on disk is not asked again"


def test_killed_before_its_lines_were_put_in_order(
    scripted_model_dir: Path, write, tmp_path: Path, monkeypatch, page_by_page
) -> None:
    data = write(
        *([{"images": [f"{name}.png"], "user": "what is the color"}] for name in ("red", "blue", "red", "blue"))
    )
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(room.AnswerFile, "finish", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            predict(str(scripted_model_dir), data, out=out, **FLAGS)
    assert [line["line"] for line in lines_of(out)] == [1, 3, 2, 4]  # page by page
    predict(str(scripted_model_dir), data, out=out, **FLAGS)
    assert [line["line"] for line in lines_of(out)] == [1, 2, 3, 4]
    assert {line["prediction"] for line in lines_of(out)} == {"blue"}


def test_a_real_kill(tiny_checkpoint_dir: Path, tiny_data: Path, expected, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    script = f"""
import os, signal
from pathlib import Path
from phi3v.infer import predict as room
from phi3v.infer.answering import Loading
room.QUESTIONS_AT_ONCE, real, writes = 0, os.fsync, []
def fsync(descriptor):
    real(descriptor)
    if Path({str(out)!r}).exists():
        writes.append(1)
    if len(writes) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
room.predict({str(tiny_checkpoint_dir)!r}, Path({str(tiny_data)!r}), out=Path({str(out)!r}), **{FLAGS!r})
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    assert 0 < len(lines_of(out)) < len(expected)
    predict(str(tiny_checkpoint_dir), tiny_data, out=out, **FLAGS)
    assert lines_of(out) == expected


# -- what is not gone on with ----------------------------------------------------------------------------------------


def test_a_file_is_never_made_in_two_ways(
    scripted_model_dir: Path, write, tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = write(*([{"images": ["red.png"], "user": text}] for text in ("what is the color", "is this red", "why")))
    out = predict(str(scripted_model_dir), data, out=tmp_path / "out.jsonl", limit=2, **FLAGS)
    before = out.read_bytes()
    for changed, message in (
        ({"max_new_tokens": 7}, r"out\.jsonl was begun otherwise: --max-new-tokens was 6, now 7"),
        ({"limit": 3}, r"--limit was 2, now 3"),
        ({"labels": ("red", "blue")}, r"--labels was \[\], now \['red', 'blue'\]"),
    ):
        with pytest.raises(InputError, match=message):
            predict(str(scripted_model_dir), data, out=out, **{"limit": 2, **FLAGS, **changed})
    with pytest.raises(InputError, match=r"out\.jsonl was begun otherwise: the model has changed since; choose"):
        predict(str(tiny_model_dir), data, out=out, limit=2, **FLAGS)
    data.write_bytes(data.read_bytes() + b"\n")
    with pytest.raises(InputError, match="the data has changed since"):
        predict(str(scripted_model_dir), data, out=out, limit=2, **FLAGS)
    assert out.read_bytes() == before


def test_a_model_goes_on_under_another_name(scripted_model_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(scripted_model_dir, tmp_path / "moved")
    out = predict(str(scripted_model_dir), tiny_data, out=tmp_path / "out.jsonl", **FLAGS)
    assert predict(str(tmp_path / "moved"), tiny_data, out=out, **FLAGS) == out
    with pytest.raises(InputError, match=r"--out .* is a folder: name a file"):
        predict(str(scripted_model_dir), tiny_data, out=tmp_path, **FLAGS)


def test_other_files_are_left_alone(scripted_model_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.jsonl"
    precious.write_text('{"id": "e0"}\n')
    with pytest.raises(InputError, match=r"precious\.jsonl exists, and not from `phi3v predict`"):
        predict(str(scripted_model_dir), tiny_data, out=precious, **FLAGS)
    assert precious.read_text() == '{"id": "e0"}\n'
    out = predict(str(scripted_model_dir), tiny_data, out=tmp_path / "out.jsonl", limit=2, **FLAGS)
    out.write_text(out.read_text() + out.read_text())
    with pytest.raises(InputError, match=r"out\.jsonl:3: this line is not from here"):
        predict(str(scripted_model_dir), tiny_data, out=out, limit=2, **FLAGS)
    out.write_text("{not json\n")
    with pytest.raises(InputError, match=r"out\.jsonl:1: not JSON"):
        predict(str(scripted_model_dir), tiny_data, out=out, limit=2, **FLAGS)


def test_two_at_once_are_one_too_many(scripted_model_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    lock = str(tmp_path / ".out.jsonl.lock")
    holder = f"import fcntl, sys; f = open({lock!r}, 'a+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); "
    with subprocess.Popen(
        [sys.executable, "-c", holder + "sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match=r"out\.jsonl: another process is writing it"):
            predict(str(scripted_model_dir), tiny_data, out=out, **FLAGS)
        other.kill()


# -- bad examples ----------------------------------------------------------------------------------------------------


@pytest.fixture
def troubled(write, tmp_path: Path) -> Path:
    """Questions about an image that is missing, one that ends after its header, and a text with a tag too many."""
    ask = {"user": "what is the color"}
    data = write(
        [{"images": ["red.png"], **ask}],
        [{"images": ["gone.png"], **ask}],
        [{"images": ["cut.png"], **ask}],
        [{"images": ["blue.png"], "user": "<|image_1|><|image_2|> what"}],
        [{"images": ["blue.png"], **ask}],
    )
    Image.effect_noise((64, 64), 50).save(tmp_path / "images/cut.png")
    whole = (tmp_path / "images/cut.png").read_bytes()
    (tmp_path / "images/cut.png").write_bytes(whole[: len(whole) // 2])
    return data


def test_a_bad_example_ends_it_by_file_and_line(scripted_model_dir: Path, troubled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"asked\.jsonl:2: .*gone\.png: no such image"):
        predict(str(scripted_model_dir), troubled, out=tmp_path / "out.jsonl", **FLAGS)
    Image.new("RGB", (9, 9)).save(tmp_path / "images/gone.png")
    troubled.write_text("".join(line for line in troubled.read_text().splitlines(True) if "image_2" not in line))
    with pytest.raises(InputError, match=r"asked\.jsonl:3: example q2: .*cut\.png: unreadable image"):
        predict(str(scripted_model_dir), troubled, out=tmp_path / "out.jsonl", **FLAGS)
    assert not list(tmp_path.glob("out*")), "nothing was answered, nothing is left behind"


def test_a_bad_example_can_be_skipped(scripted_model_dir: Path, troubled: Path, tmp_path: Path, capsys) -> None:
    out = predict(str(scripted_model_dir), troubled, out=tmp_path / "out.jsonl", on_bad_example="skip", **FLAGS)
    lines = lines_of(out)
    assert [line["line"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line.get("prediction") for line in lines] == ["blue", None, None, None, "blue"]
    assert lines[1]["error"].endswith("gone.png: no such image")
    assert "unreadable image" in lines[2]["error"]
    assert lines[3]["error"].startswith("prompt has 2 image tags")
    assert "3 of 5 lines have an error instead of a prediction" in capsys.readouterr().out


def test_what_is_no_example_ends_it_anyway(scripted_model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"id": "a", "conversations": [{"user": "q"}]}\n{"id": "b", "conversations": [{"usr": "q"}]}\n')
    with pytest.raises(InputError, match=r"data\.jsonl:2: turn 1: unknown key 'usr': did you mean 'user'\?"):
        predict(str(scripted_model_dir), data, out=tmp_path / "out.jsonl", on_bad_example="skip", **FLAGS)

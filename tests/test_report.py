"""The report: a page from whatever a run folder holds, with nothing of the model's text alive in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.errors import InputError
from phi3v.report import NUM_PICTURES, write_report

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Collects what a browser would see: the tags with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text += data + " "

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def step(number: int, **values: Any) -> dict[str, Any]:
    line = {"kind": "step", "step": number, "epoch": number / 10, "loss": 1 / number, "learning_rate": 1e-3 / number}
    line |= {"grad_norm": 1.0, "examples": 16, "tokens": 800, "examples_per_s": 8.0, "tokens_per_s": 400.0}
    return line | {"data_wait": 0.1, "seconds": 2.0, "memory_gb": 1.5} | values


def prediction(number: int, answer: str, said: str, image: Path | str, **values: Any) -> dict[str, Any]:
    line = {"id": f"q{number}", "source": "t", "where": f"t.jsonl:{number}", "images": [str(image)]}
    line |= {"user": f"<|image_1|>\nquestion {number}?", "answers": [answer], "prediction": said}
    return line | {"correct": said == answer, "anls": float(said == answer), "num_tokens": 3} | values


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 48), "teal").save(path)
    return path


@pytest.fixture
def run(tmp_path: Path, picture: Path) -> Path:
    """A finished run of 20 steps: 40 test questions, 12 of them answered wrongly."""
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 42, "optim": {"betas": [0.9, 0.95], "lora": None}}))
    (run / "environment.json").write_text(json.dumps({"torch": "2.13.0"}))
    evals = [
        {"kind": "eval", "step": n, "split": "test", "metrics": {"accuracy": n / 25, "anls": 0.9}} for n in (10, 20)
    ]
    write_lines(run / "log.jsonl", [*(step(n) for n in range(1, 21)), *evals])
    predictions = [prediction(n, "yes", "no" if n < 12 else "yes", picture) for n in range(30)]
    predictions += [prediction(n, "blue", "blue", picture) for n in range(30, 40)]
    write_lines(run / "predictions.jsonl", predictions)
    final = {"accuracy": 0.7, "exact_match": 0.7, "anls": 0.71, "questions": 40}
    metrics = {"before": None, "final": final, "baselines": {"majority": 0.25, "blind": 0.5}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


def report(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_report_shows_the_run(run: Path) -> None:
    page = report(run)
    words = " ".join(page.text.split())
    assert "my-run" in words
    assert "70.0 % of 40 test questions answered correctly" in words
    assert "20.0 points above the best a model can do without looking at the pictures" in words
    for text in ("Majority", "25.0 %", "Blind", "50.0 %", "betas", "0.9, 0.95", "torch", "2.13.0"):
        assert text in words
    assert "Before" not in words  # this run was not evaluated before training
    for title in ("Loss", "Metrics during training", "Learning rate", "Gradient norm", "Tokens per second"):
        assert title in words
    assert "step 10: ANLS 90.0 %, accuracy 40.0 %" in words  # readable by pointing at the curve
    assert not page.of_class("missing")


def test_final_evaluation_replaces_the_one_during_training_at_the_same_step(run: Path) -> None:
    evals = [
        {"kind": "eval", "step": number, "split": split, "metrics": {"accuracy": accuracy, "questions": 40}}
        for number, split, accuracy in (
            (0, "before", 0.0),
            (10, "during", 0.5),
            (20, "during", 0.6),
            (20, "final", 0.7),
        )
    ]
    write_lines(run / "log.jsonl", evals)
    text = report(run).text
    assert re.findall(r"step \d+: [\d.]+", text) == ["step 0: 0.0", "step 10: 50.0", "step 20: 70.0"]


def test_folder_of_an_evaluation(run: Path) -> None:
    """`phi3v evaluate` writes predictions and the scores alone."""
    (run / "metrics.json").write_text(json.dumps({"accuracy": 0.5, "anls": 0.6, "questions": 40}))
    (run / "log.jsonl").unlink()
    assert "50.0 % of 40 test questions answered correctly" in " ".join(report(run).text.split())


def test_training_facts_add_up_over_the_steps(run: Path) -> None:
    lines = [step(1), step(2), step(2, examples=32, memory_gb=3.0, skipped=True), step(3)]  # 2 was repeated
    write_lines(run / "log.jsonl", [*lines, {"kind": "complaint", "step": 3, "what": "?", "examples": []}])
    words = " ".join(report(run).text.split())
    assert "3 steps" in words
    assert "64 examples" in words
    assert "6 s time in training" in words
    assert "10.7 examples per second" in words
    assert "1 steps skipped" in words
    assert "10.0 % waiting for data" in words
    assert "3.0 GB peak memory" in words


def test_shares_of_the_time_are_weighed_by_it(run: Path) -> None:
    write_lines(run / "log.jsonl", [step(1, data_wait=0.5, seconds=1.0), step(2, data_wait=0.1, seconds=3.0)])
    words = " ".join(report(run).text.split())
    assert "20.0 % waiting for data" in words
    assert "skipped" not in words


def test_wrong_pictures_come_first(run: Path) -> None:
    page = report(run)
    cards = page.of_class("question")
    wrong = ["wrong" in (card["class"] or "") for card in cards]
    assert len(cards) == NUM_PICTURES
    assert wrong == [True] * 12 + [False] * 18
    assert "<|image_1|>" not in page.text


def test_some_right_answers_are_shown_beside_many_wrong_ones(run: Path, picture: Path) -> None:
    lines = [prediction(n, "yes", "no", picture) for n in range(100)]
    write_lines(run / "predictions.jsonl", lines + [prediction(n, "no", "no", picture) for n in range(100, 140)])
    wrong = ["wrong" in (card["class"] or "") for card in report(run).of_class("question")]
    assert wrong == [True] * 20 + [False] * 10
    write_lines(run / "predictions.jsonl", [*lines, prediction(100, "no", "no", picture)])
    assert len(report(run).of_class("question")) == NUM_PICTURES


def test_different_pictures_before_the_same_again(run: Path, tmp_path: Path, picture: Path) -> None:
    rare = tmp_path / "rare.png"
    Image.new("RGB", (8, 8), "red").save(rare)
    lines = [prediction(n, "yes", "no", picture) for n in range(200)] + [prediction(200, "yes", "no", rare)]
    write_lines(run / "predictions.jsonl", lines)
    assert "question 200?" in report(run).text


def test_confusion_counts_and_marks_the_diagonal(run: Path) -> None:
    page = report(run)
    right = [attrs["title"] for tag, attrs in page.tags if tag == "td" and attrs.get("class") == "right"]
    wrong = [attrs["title"] for tag, attrs in page.tags if tag == "td" and attrs.get("class") == "wrong"]
    assert [(title or "").splitlines()[:2] for title in right] == [
        ["answer: yes", "model: yes"],
        ["answer: blue", "model: blue"],
    ]
    assert "18 of 30" in (right[0] or "")
    assert [(title or "").splitlines() for title in wrong] == [
        ["answer: yes", "model: something else", "12 of 30 (40.0\N{NO-BREAK SPACE}%)"]
    ]


def test_free_text_has_no_confusion_table(run: Path, picture: Path) -> None:
    write_lines(run / "predictions.jsonl", [prediction(n, f"answer {n}", "no", picture) for n in range(60)])
    page = report(run)
    assert "free text" in page.text
    assert not page.of_class("confusion")


def test_text_of_model_and_data_is_escaped(run: Path, picture: Path) -> None:
    (run / "config.json").write_text(json.dumps({ATTACK: {ATTACK: ATTACK}}))
    attacks = [prediction(n, ATTACK, ATTACK, picture, id=ATTACK, user=ATTACK) for n in range(3)]
    write_lines(run / "predictions.jsonl", [*attacks, prediction(3, "yes", ATTACK, picture)])
    page = report(run)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "link")]
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all((attrs["src"] or "").startswith("data:image/") for tag, attrs in page.tags if tag == "img")
    assert page.text.count(ATTACK) >= 10  # it is all there, as text


def test_page_reaches_for_nothing_outside(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    assert not re.findall(r"(?:https?:)?//[a-z]|url\(|@import", text)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text


def test_half_a_character_is_written(run: Path, picture: Path) -> None:
    write_lines(run / "predictions.jsonl", [prediction(1, "yes", "\ud83d", picture)])
    assert "yes" in report(run).text


def test_missing_picture_is_said(run: Path, tmp_path: Path) -> None:
    write_lines(run / "predictions.jsonl", [prediction(1, "yes", "no", tmp_path / "gone.png")])
    assert "picture not readable" in report(run).text


def test_large_picture_is_made_small(run: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.effect_noise((1600, 1200), 90).save(large)
    write_lines(run / "predictions.jsonl", [prediction(n, "yes", "no", large) for n in range(30)])
    assert write_report(run).stat().st_size < 2_000_000


@pytest.mark.parametrize("present", ["config.json", "log.jsonl", "metrics.json", "predictions.jsonl"])
def test_each_part_alone_is_enough(run: Path, present: str) -> None:
    for path in run.iterdir():
        if path.name != present:
            path.unlink()
    page = report(run)
    assert page.of_class("missing")
    assert ("No steps yet" in page.text) == (present != "log.jsonl")
    assert ("No predictions yet" in page.text) == (present != "predictions.jsonl")
    assert ("No final scores yet" in page.text) == (present != "metrics.json")


def test_log_that_is_being_written(run: Path) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 21, "lo')
    assert "20 steps" in " ".join(report(run).text.split())


def test_empty_and_odd_logs(run: Path) -> None:
    (run / "log.jsonl").write_text("")
    (run / "metrics.json").write_text("{}")
    assert "No steps yet" in report(run).text
    write_lines(run / "log.jsonl", [step(1, loss=float("nan"), grad_norm=None)])
    assert "Gradient norm" not in report(run).text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("log.jsonl", "7\n{}\n"),
        ("log.jsonl", '{"kind": "step"}\n'),
        ("log.jsonl", '{"kind": "step", "step": 1, "seconds": "long"}\n'),
        ("metrics.json", '{"final": {"accuracy": "high"}}'),
        ("metrics.json", '{"final": 7}'),
        ("predictions.jsonl", '{"prediction": 7, "answers": []}\n'),
        ("predictions.jsonl", "[]\n"),
    ],
)
def test_files_that_no_run_writes_are_refused_in_one_line(file: str, content: str, run: Path) -> None:
    (run / file).write_text(content)
    with pytest.raises(InputError, match=r"my-run: its files do not hold what a run writes \("):
        write_report(run)
    (run / file).write_bytes(b"\xff\n\n")
    with pytest.raises(InputError, match=rf"{file}.*not (JSON|UTF-8)"):
        write_report(run)


def test_bad_folders_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path / "empty")
    (run / "log.jsonl").write_text('{"kind": "step", "step"\n{}\n')
    with pytest.raises(InputError, match=r"log\.jsonl:1: not JSON"):
        write_report(run)
    (run / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: must hold an object, not a list"):
        write_report(run)

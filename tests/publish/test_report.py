"""The report: a page from whatever run folders hold, with nothing of the model's text alive in it.

What its script does is tested in a browser: test_html.py.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.publish.gallery import Options, choose
from phi3v.publish.report import write_report

OLDEST = ("id", "images", "user", "answers", "prediction", "correct")
ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Collects what a browser would see: the tags with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.gallery: dict[str, Any] = {}
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
        if "script" in self.open:
            if self.tags[-1][1].get("id") == "gallery":
                self.gallery = json.loads(data)
        elif not {"style", "title"} & set(self.open):
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


def report(*runs: Path, out: Path | None = None, **options: Any) -> Page:
    path = write_report(*runs, out=out, options=Options(**options))
    assert path == (out or runs[0] / "report.html")
    return Page(path.read_text(encoding="utf-8"))


def test_report_shows_the_run(run: Path) -> None:
    page = report(run)
    words = " ".join(page.text.split())
    assert "my-run" in words
    assert "70.0 % of 40 test questions answered correctly" in words
    assert "20.0 points above the best a model can do without looking at the images" in words
    for text in ("Majority", "25.0 %", "Blind", "50.0 %", "betas", "0.9, 0.95", "torch", "2.13.0"):
        assert text in words
    assert "Before" not in words  # this run was not evaluated before training
    for title in ("Loss", "Metrics during training", "Learning rate", "Gradient norm", "Examples per second", "Memory"):
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
    assert "0:00:06 time in training" in words
    assert "10.7 examples per second" in words
    assert "1 steps skipped" in words
    assert "10.0 % waiting for data" in words
    assert "3.0 GB peak memory" in words


def test_shares_of_the_time_are_weighed_by_it(run: Path) -> None:
    write_lines(run / "log.jsonl", [step(1, data_wait=0.5, seconds=1.0), step(2, data_wait=0.1, seconds=3.0)])
    words = " ".join(report(run).text.split())
    assert "20.0 % waiting for data" in words
    assert "skipped" not in words


def test_every_question_is_in_the_gallery(run: Path, picture: Path) -> None:
    page = report(run)
    entries = page.gallery["entries"]
    assert [entry["group"] for entry in entries] == ["wrong"] * 12 + ["right"] * 28
    assert "All 40 questions, 12 of them answered wrongly." in page.text
    assert len(page.gallery["images"]) == 1  # the same for all
    first = entries[0]
    assert (first["asked"], first["images"]) == ("question 0?", [0])
    assert first["rows"] == [["answer", "yes", ""], ["model", "no \N{BALLOT X}", "bad"]]


def test_of_many_questions_some_wrong_and_some_right_ones_are_kept() -> None:
    correct = [n >= 100 for n in range(140)]
    kept = choose(correct, 30)
    assert [correct[at] for at in kept] == [False] * 20 + [True] * 10
    assert len(choose(correct[:101], 30)) == 30
    assert choose(correct, 140) == list(range(140))


def test_what_is_left_out_is_said_with_the_flag_for_it(run: Path, tmp_path: Path) -> None:
    page = report(run, limit=10)
    assert len(page.gallery["entries"]) == 10
    assert "10 of 40 questions, 6 of the 12 wrong ones (--limit shows more)" in page.text
    noise = []
    for n in range(6):
        noise.append(tmp_path / f"noise-{n}.png")
        Image.effect_noise((400, 300), 90).save(noise[-1])
    write_lines(run / "predictions.jsonl", [prediction(n, "yes", "no", noise[n]) for n in range(6)])
    page = report(run, picture_mb=0.1)
    shown = sum(entry["images"] != [-1] for entry in page.gallery["entries"])
    assert 0 < shown < 6
    assert f"{6 - shown} lack images, which would take more than 0.1 MB (--picture-mb)" in page.text
    assert len(json.dumps(page.gallery["images"])) < 100_000


# -- the conversation, from the data file ----------------------------------------------------------------------------


def conversation(folder: Path) -> dict[str, Any]:
    """Writes a data file with one conversation of two turns about one picture; its second question, answered."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(folder / "images" / "red.png")
    turns = [{"images": ["red.png"], "user": "<|image_1|>\nwhat?", "assistant": "red"}]
    turns.append({"user": "sure?", "assistant": "yes"})
    (folder / "test.jsonl").write_text(json.dumps({"id": "a", "conversations": turns}) + "\n")
    where = f"{folder / 'test.jsonl'}:1"
    return prediction(0, "yes", "no", folder / "images/red.png", id="a#2", user="sure?", where=where)


def test_the_whole_conversation_is_shown(run: Path, tmp_path: Path) -> None:
    write_lines(run / "predictions.jsonl", [conversation(tmp_path / "data")])
    (entry,) = report(run).gallery["entries"]
    assert entry["turns"] == [["what?", "red", 1], ["sure?", None, 0]]


def test_pictures_that_have_moved_are_found_through_the_data(run: Path, tmp_path: Path) -> None:
    write_lines(run / "predictions.jsonl", [conversation(tmp_path / "old")])
    (tmp_path / "old").rename(tmp_path / "new")
    missing = report(run).gallery
    assert missing["images"] == [None]
    assert missing["entries"][0]["turns"] == [["sure?", None, 1]]
    moved = report(run, data=tmp_path / "new" / "test.jsonl").gallery
    assert moved["images"][0]["width"] == 20
    (tmp_path / "new" / "images").rename(tmp_path / "pictures")
    data = tmp_path / "new" / "test.jsonl"
    assert report(run, data=data, image_root=tmp_path / "pictures").gallery == moved
    (run / "config.json").write_text(json.dumps({"data": {"image_root": str(tmp_path / "pictures")}}))
    assert report(run, data=data).gallery == moved


def test_what_has_vanished_is_named_and_kept_as_the_page_had_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(run / "predictions.jsonl", [conversation(tmp_path / "data")])
    before = report(run).gallery
    assert capsys.readouterr().out == ""
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    for _ in range(2):  # what the page keeps is kept by the next one, too
        kept = report(run).gallery
        assert kept["images"] == before["images"] != [None]
        assert kept["entries"][0]["turns"] == before["entries"][0]["turns"]
        said = capsys.readouterr().out.replace("\n", " ")
        assert f"1 image cannot be found, such as {tmp_path / 'data/images/red.png'}; the page keeps 1 of them" in said
        assert f"{tmp_path / 'data/test.jsonl'} cannot be found: earlier turns may be missing (--data)" in said
    report(run, out=tmp_path / "another.html")
    assert "the page keeps 0 of them" in capsys.readouterr().out.replace("\n", " ")
    report(run, data=tmp_path / "elsewhere/test.jsonl")
    assert capsys.readouterr().out == ""


def test_images_are_shown_as_the_model_saw_them(run: Path, picture: Path) -> None:
    logo = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    logo.paste((0, 0, 0, 255), (9, 9, 50, 20))
    logo.save(picture)
    blank = report(run).gallery["images"]
    (run / "config.json").write_text(json.dumps({"base": {"image_colors": "visible", "exif_orientation": None}}))
    assert report(run).gallery["images"] != blank


def test_warnings_about_the_data_are_shown(run: Path) -> None:
    (run / "warnings.json").write_text(json.dumps({"data": ["9 of 10 examples are also in <train>"]}))
    page = report(run)
    assert "Warnings about the data" in page.text
    assert "9 of 10 examples are also in <train>" in page.text


def test_data_that_has_changed_is_not_taken_for_what_was_asked(run: Path, tmp_path: Path) -> None:
    line = conversation(tmp_path / "data")
    write_lines(run / "predictions.jsonl", [{**line, "user": "another question?"}])
    assert report(run).gallery["entries"][0]["turns"] == [["another question?", None, 1]]
    (tmp_path / "data" / "test.jsonl").write_text("{")
    assert report(run).gallery["entries"]
    with pytest.raises(InputError, match=r"test.jsonl:1: not JSON"):
        report(run, data=tmp_path / "data" / "test.jsonl")


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
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json", None]
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "object", "link", "img")]
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(ATTACK) >= 4  # it is all there, as text
    assert page.gallery["entries"][0]["asked"] == ATTACK


def test_page_reaches_for_nothing_outside(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    assert not re.findall(r"(?:https?:)?//[a-z]|url\(|@import", re.sub(r'<script type="application/json".*', "", text))
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_what_json_does_not_know_is_left_out(run: Path, picture: Path) -> None:
    likely = {"yes": float("-inf"), "no": -0.1}
    write_lines(
        run / "predictions.jsonl", [prediction(1, "yes", "no", picture, anls=float("nan"), label_log_probs=likely)]
    )
    (entry,) = report(run).gallery["entries"]
    assert entry["score"] is None
    assert ["log-probabilities", "no -0.1, yes -inf"] in entry["details"]


def test_missing_picture_is_no_error(run: Path, tmp_path: Path) -> None:
    write_lines(run / "predictions.jsonl", [prediction(1, "yes", "no", tmp_path / "gone.png")])
    gallery = report(run).gallery
    assert gallery["images"] == [None]
    assert gallery["entries"][0]["images"] == [0]


def test_large_picture_is_made_small(run: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.effect_noise((1600, 1200), 90).save(large)
    write_lines(run / "predictions.jsonl", [prediction(1, "yes", "no", large)])
    (shown,) = report(run, picture_size=100).gallery["images"]
    assert (shown["width"], shown["height"]) == (1600, 1200)
    assert Image.open(io.BytesIO(base64.b64decode(shown["src"].partition(",")[2]))).size == (100, 75)


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
    ("file", "content", "message"),
    [
        ("log.jsonl", '{"kind": "step"}\n', r"log\.jsonl:1: step: is missing"),
        (
            "log.jsonl",
            '{}\n{"kind": "step", "step": 1, "seconds": "long"}\n',
            r"log\.jsonl:2: seconds: must be a number",
        ),
        ("log.jsonl", '{"kind": "eval", "step": 1, "metrics": 3}\n', r"log\.jsonl:1: metrics: must be an object"),
        (
            "metrics.json",
            '{"final": {"accuracy": "high"}}',
            r"metrics\.json: final.*: must be an integer or a number",
        ),
        ("metrics.json", '{"final": 7}', r"metrics\.json: final: must be an object, not an integer"),
        ("lengths.json", '{"tokens": {"mean": 1}}', r"lengths\.json: tokens: p50: is missing"),
        ("published.json", '{"score": 7}', r"published\.json: model: is missing"),
    ],
)
def test_damaged_files_are_refused_in_one_line(file: str, content: str, message: str, run: Path) -> None:
    (run / file).write_text(content)
    with pytest.raises(InputError, match=message):
        write_report(run)
    (run / file).write_bytes(b"\xff\n\n")
    with pytest.raises(InputError, match=rf"{file}.*not (JSON|UTF-8)"):
        write_report(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": 7}, "41: prediction: must be a string, not an integer"),
        ({"images": [1]}, r"41: images.*: must be a string, not an integer"),
        ({"answers": []}, "41: answers is empty"),
        (None, "41: must hold an object"),
    ],
)
def test_damaged_predictions_are_named(change, message: str, run: Path, picture: Path) -> None:
    line = [] if change is None else {**prediction(1, "yes", "no", picture), **change}
    with (run / "predictions.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=rf"predictions\.jsonl:{message}"):
        write_report(run)


def test_predictions_of_earlier_versions_have_fewer_fields(run: Path, picture: Path) -> None:
    line = prediction(1, "yes", "yes", picture)
    write_lines(run / "predictions.jsonl", [{key: line[key] for key in OLDEST}])
    (entry,) = report(run).gallery["entries"]
    assert entry["details"] == [["score", "right, ANLS 100.0\N{NO-BREAK SPACE}%"], ["id", "q1"]]


def test_bad_folders_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: not a run folder"):
        write_report(tmp_path / "none")
    with pytest.raises(InputError, match=r"report needs a run folder"):
        write_report()
    with pytest.raises(InputError, match=r"the name of a page ends in .html"):
        write_report(run, out=tmp_path / "train.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path / "empty")
    (run / "log.jsonl").write_text('{"kind": "step", "step"\n{}\n')
    with pytest.raises(InputError, match=r"log\.jsonl:1: not JSON"):
        write_report(run)
    (run / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: must hold an object, not a list"):
        write_report(run)


# -- several runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def other(run: Path, picture: Path) -> Path:
    """The same run with another seed and mode, which answers everything rightly and has seen no picture of old age."""
    other = run.with_name("other-run")
    shutil.copytree(run, other)
    (other / "config.json").write_text(json.dumps({"seed": 7, "optim": {"betas": [0.9, 0.95], "lora": None}}))
    write_lines(other / "predictions.jsonl", [prediction(n, "yes", "yes", picture) for n in range(40)])
    final = {"accuracy": 1.0, "exact_match": 1.0, "anls": 1.0, "questions": 40}
    metrics = {"before": None, "final": final, "baselines": {"majority": 0.25, "blind": 0.5}}
    (other / "metrics.json").write_text(json.dumps(metrics))
    return other


def test_runs_are_compared(run: Path, other: Path, tmp_path: Path) -> None:
    page = report(run, other, out=tmp_path / "both.html")
    words = " ".join(page.text.split())
    assert "2 runs" in words
    assert "seed 42 7" in words
    assert "0.9, 0.95" in words  # under settings, in full
    assert "betas 0.9, 0.95 0.9, 0.95" not in words  # but it does not differ
    assert "Accuracy the whole answer is right; case, outer spaces and full stops do not count 70.0 % 100.0 %" in words
    assert words.count("always the most frequent answer") == 2  # a baseline of both, in the bars and in the table
    assert "step 20: my-run 80.0 %, other-run 80.0 %" in words
    assert "cannot be compared" not in words
    gallery = page.gallery
    assert gallery["runs"] == ["my-run", "other-run"]
    assert [entry["run"] for entry in gallery["entries"]] == [0] * 40 + [1] * 40
    keys = [entry["key"] for entry in gallery["entries"]]
    assert keys[:40] == keys[40:]  # the same questions, with both answers
    some = [entry["key"] for entry in report(run, other, out=tmp_path / "both.html", limit=9).gallery["entries"]]
    assert (len(some), some[:9]) == (18, some[9:])


def test_scores_on_different_questions_are_not_compared_in_silence(run: Path, other: Path, tmp_path: Path) -> None:
    lines = (other / "predictions.jsonl").read_text().splitlines()
    (other / "predictions.jsonl").write_text("\n".join(lines[:20]) + "\n")
    assert "scored on different questions" in report(run, other, out=tmp_path / "both.html").text


def test_runs_of_the_same_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere" / run.name
    shutil.copytree(run, again)
    assert report(run, again, out=tmp_path / "both.html").gallery["runs"] == [str(run), str(again)]


def test_a_run_of_a_recipe_is_held_against_what_was_published(run: Path, picture: Path) -> None:
    lines = [prediction(n, "yes", "yes", picture, source="docvqa") for n in range(4)]
    write_lines(run / "predictions.jsonl", lines)
    published = {"model": "Phi-3-vision", "metric": "anls", "mode": "lora", "dtype": "bf16", "score": 0.825, "note": ""}
    (run / "published.json").write_text(json.dumps(published))
    words = " ".join(report(run).text.split())
    assert "Published Phi-3-vision, lora, bf16" in words
    assert "0 below one half 71.0 % 82.5 %" in words
    (run / "published.json").write_text(json.dumps({**published, "dtype": "fp16", "note": "suspect: too good"}))
    words = " ".join(report(run).text.split())
    assert "Phi-3-vision, lora, fp16*" in words
    assert "* suspect: too good" in words


def test_a_run_of_an_earlier_version_has_a_report(old_run: Path) -> None:
    words = " ".join(report(old_run).text.split())
    assert "120 steps" in words
    assert "activation_memory" in words
    assert "vision_cache memory" in words


def test_lengths_and_crops_of_a_real_run(finished_run: Path, tmp_path: Path) -> None:
    page = report(finished_run, out=tmp_path / "page.html")
    for title in ("Tokens of training examples", "Answer tokens of training examples", "Crops of training examples"):
        assert title in page.text
    assert "Tokens of answers of the model" in page.text
    assert "2: 13 examples" in (tmp_path / "page.html").read_text()  # a local crop and the global one
    assert all(picture for picture in page.gallery["images"])
    two_turns = [entry for entry in page.gallery["entries"] if len(entry["turns"]) == 2]
    assert [entry["turns"][0] for entry in two_turns] == [["what is this", "a red picture", 1]]

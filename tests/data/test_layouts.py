"""The layouts of other tools, as they publish them: named, and recognized without a name."""

from __future__ import annotations

import http.server
import io
import json
import tarfile
import threading
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.cli import main
from phi3v.data.check import check
from phi3v.data.convert import convert
from phi3v.data.layouts import recognize
from phi3v.data.layouts.source import Reading
from phi3v.data.schema import read_jsonl


def image(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def place(folder: Path, files: Mapping[str, Any]) -> Path:
    """Files by name: texts, JSON, or the numbers of images."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        content = image(content) if isinstance(content, int) else content
        content = json.dumps(content) if isinstance(content, list | dict) else content
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def turns(out: Path, split: str = "train") -> list[tuple[Any, ...]]:
    """(number of the image, question, answer) of every line, of one turn each."""
    assert check(out / f"{split}.jsonl", num_workers=0).problems == ()
    found = []
    for example in read_jsonl(out / f"{split}.jsonl"):
        (turn,) = example.turns
        colors = [Image.open(image).getpixel((0, 0))[0] for image in turn.images]  # type: ignore[index]
        found.append((*colors, turn.user, turn.assistant))
    return found


DESCRIBE = "Describe the image."
CHAT = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
ASKED = {"question_id": 10, "image_id": 42, "question": "What?"}
ANSWERED = {"question_id": 10, "multiple_choice_answer": "red", "answers": [{"answer": "red"}, {"answer": "pink"}]}
CHOICE = {"type": "choices", "value": {"choices": ["red"]}}

FILES: dict[str, tuple[str, dict[str, Any], list[tuple[Any, ...]]]] = {
    "llava": ("a.json", {"a.json": [{"image": "i/7.png", "conversations": CHAT}]}, [(7, "<|image_1|>\nWhat?", "Red.")]),
    "sharegpt": (
        "a.json",
        {"a.json": [{"images": ["i/7.png"], "conversations": CHAT}]},
        [(7, "<|image_1|>\nWhat?", "Red.")],
    ),
    "messages": (
        "a.jsonl",
        {
            "a.jsonl": {
                "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}],
                "images": ["i/7.png"],
            }
        },
        [(7, "What?", "Red.")],
    ),
    "swift": (
        "a.jsonl",
        {"a.jsonl": {"query": "<image>What?", "response": "Red.", "images": ["i/7.png"]}},
        [(7, "<|image_1|>What?", "Red.")],
    ),
    "roboflow": (
        "a.jsonl",
        {"a.jsonl": {"image": "i/7.png", "prefix": "What?", "suffix": "Red."}},
        [(7, "What?", "Red.")],
    ),
    "questions": (
        "a.json",
        {
            "a.json": {
                "dataset_name": "docvqa",
                "data": [{"questionId": 1, "image": "i/7.png", "question": "What?", "answers": ["Red."]}],
            }
        },
        [(7, "What?", "Red.")],
    ),
    "vqa": (
        "q.json",
        {
            "q.json": {"questions": [ASKED]},
            "v2_annotations.json": {"annotations": [ANSWERED]},
            "i/COCO_train2014_000000000042.png": 42,
        },
        [(42, "What?", "red")],
    ),
    "coco-captions": (
        "a.json",
        {
            "a.json": {
                "images": [{"id": 1, "file_name": "i/7.png"}],
                "annotations": [{"id": 5, "image_id": 1, "caption": "A box."}],
            }
        },
        [(7, DESCRIBE, "A box.")],
    ),
    "label-studio": (
        "a.json",
        {
            "a.json": [
                {
                    "id": 1,
                    "data": {"image": "/data/local-files/?d=i/7.png", "question": "What?"},
                    "annotations": [{"result": [CHOICE]}],
                }
            ]
        },
        [(7, "What?", "red")],
    ),
    "csv": ("a.csv", {"a.csv": "image;question;answer\ni/7.png;What?;Red.\n"}, [(7, "What?", "Red.")]),
    "metadata": (".", {"metadata.jsonl": {"file_name": "i/7.png", "text": "A box."}}, [(7, DESCRIBE, "A box.")]),
    "imagefolder": (
        ".",
        {"red/7.png": 7, "i": 0},
        [(7, "Classify the image into one of the following classes: red.", "red")],
    ),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("layout", FILES)
def test_every_layout(layout: str, named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, files, expected = FILES[layout]
    folder = place(tmp_path / "source", {"i/7.png": 7, **files} if "i" not in files else {"red/7.png": 7})
    words = [layout, str(folder / source)] if named else [str(folder / source)]
    assert main(["convert", *words, "--out", str(tmp_path / "out"), "--no-progress"]) == 0
    assert turns(tmp_path / "out") == expected
    printed = capsys.readouterr().out
    assert not (tmp_path / "out/not_converted.txt").exists()
    assert (f"{folder / source}: layout {layout}, because " in printed) is not named
    assert ("before  {" in printed) is not named
    assert ('after   {"id": ' in printed) is not named


@pytest.mark.parametrize("layout", ["llava", "csv", "vqa", "imagefolder"])
@pytest.mark.parametrize("around", ["", "all/"])
def test_archives(layout: str, around: str, tmp_path: Path) -> None:
    _, files, expected = FILES[layout]
    files = {"i/7.png": 7, **files} if "i" not in files else {"red/7.png": 7}
    files = {name: content for name, content in files.items() if name != "v2_annotations.json"}
    folder = place(tmp_path / "source", files)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, around + str(file.relative_to(folder)))
        archive.writestr("__MACOSX/._a", b"")
    reading = Reading(unanswered=layout == "vqa")
    convert(tmp_path / "data.zip", out=tmp_path / "out", reading=reading, progress=False)
    if layout == "vqa":
        (question,) = read_jsonl(tmp_path / "out/questions.jsonl", prompts=True)
        assert (question.turns[0].user, question.turns[0].assistant) == ("What?", None)
    else:
        assert turns(tmp_path / "out") == expected
    assert {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".txt"} <= {
        "images", "train.jsonl", "questions.jsonl", ".train.jsonl.checked.json",
    }  # fmt: skip
    (tmp_path / "data.zip").write_bytes(b"PK no archive")
    with pytest.raises(InputError, match=r"data\.zip: cannot be unpacked: "):
        convert(tmp_path / "data.zip", out=tmp_path / "other", progress=False)


def test_parquet_and_arrow(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["blue", "red"]),
            "width": datasets.Value("int64"),
        }
    )
    rows = {"image": [{"bytes": image(k), "path": None} for k in (1, 2)], "label": [1, 0], "width": [8, 8]}
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "hub/data").mkdir(parents=True)
    table.to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    table.select([1]).to_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet")
    reading = Reading(question="Which color?")
    convert(tmp_path / "hub", out=tmp_path / "out", reading=reading, progress=False)
    assert turns(tmp_path / "out") == [(1, "Which color?", "red"), (2, "Which color?", "blue")]
    assert turns(tmp_path / "out", "test") == [(2, "Which color?", "blue")]
    assert (tmp_path / "out/not_used.txt").read_text() == "width: 3 records\n"
    table.save_to_disk(tmp_path / "disk")
    convert("parquet", tmp_path / "disk", out=tmp_path / "arrow", reading=reading, progress=False)
    assert turns(tmp_path / "arrow") == turns(tmp_path / "out")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"bad\.parquet: damaged or not fully downloaded"):
        convert("parquet", tmp_path / "bad.parquet", out=tmp_path / "other", progress=False)


def test_parquet_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"images": [{"bytes": image(3)}], "texts": [{"user": "What?", "assistant": "Red.", "source": "x"}]}]
    (tmp_path / "hub").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hub/train-0.parquet")
    asked = []
    monkeypatch.setattr(
        "phi3v.data.hub.snapshot_download", lambda name, **how: asked.append((name, how)) or tmp_path / "hub"
    )
    convert("parquet", Path("someone/data"), out=tmp_path / "out", progress=False)
    assert asked == [("someone/data", {"repo_type": "dataset", "allow_patterns": ["*.parquet"]})]
    assert turns(tmp_path / "out") == [(3, "What?", "Red.")]


def test_webdataset(tmp_path: Path) -> None:
    files = {
        "a/7.png": image(7), "a/7.json": b'{"question": "What?", "answer": "Red.", "url": "http://x/7.png"}',
        "8.png": image(8), "8.txt": b"A box.", "9.png": image(9), "9.json": b"{", "10.txt": b"No image.",
    }  # fmt: skip
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/train-0.tar", "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    convert(tmp_path / "shards", out=tmp_path / "out", progress=False)
    assert turns(tmp_path / "out") == [(7, "What?", "Red."), (8, DESCRIBE, "A box."), (DESCRIBE, "No image.")]
    (broken,) = (tmp_path / "out/not_converted.txt").read_text().splitlines()
    assert broken.startswith(f"{tmp_path}/shards/train-0.tar, 9: 9.json: not JSON: ")
    whole = (tmp_path / "shards/train-0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    with pytest.raises(InputError, match=r"cut\.tar: damaged or not fully downloaded"):
        convert("webdataset", tmp_path / "cut.tar", out=tmp_path / "other", progress=False)


def test_metadata_of_splits(tmp_path: Path) -> None:
    files = {"train/metadata.csv": "file_name,caption\n7.png,A box.\n", "train/7.png": 7, "validation/8.png": 8}
    folder = place(
        tmp_path / "source", {**files, "validation/metadata.jsonl": {"file_name": "8.png", "caption": "Two."}}
    )
    convert(folder, out=tmp_path / "out", reading=Reading(question="What?"), progress=False)
    assert (turns(tmp_path / "out"), turns(tmp_path / "out", "val")) == (
        [(7, "What?", "A box.")],
        [(8, "What?", "Two.")],
    )


def test_label_studio_s_annotators(tmp_path: Path) -> None:
    two = [{"result": [CHOICE]}, {"result": [{"type": "textarea", "value": {"text": ["pink", "dark"]}}]}]
    boxes = [{"result": [{"type": "rectanglelabels", "value": {"x": 1}}]}]
    data = {"image": "/data/upload/i/a%20b.png"}
    tasks = [
        {"data": data, "annotations": two},
        {"data": data, "annotations": [{"result": [CHOICE], "was_cancelled": True}]},
        {"data": data, "annotations": boxes},
        {"data": 7, "annotations": []},
    ]
    folder = place(tmp_path / "source", {"i/a b.png": 5, "a.json": tasks})
    convert("label-studio", folder / "a.json", out=tmp_path / "out", reading=Reading(question="What?"), progress=False)
    (example,) = read_jsonl(tmp_path / "out/train.jsonl")
    assert (example.turns[0].assistant, example.answers) == ("red", ("red", "pink, dark"))
    cancelled, other, damaged = (tmp_path / "out/not_converted.txt").read_text().splitlines()
    assert "the last question has no answer (--unanswered keeps it for phi3v predict)" in cancelled
    assert "an annotation of type 'rectanglelabels': only choices, textarea, number, rating are converted" in other
    assert "data: must be an object, not an integer" in damaged


def test_numbered_images_that_are_not_there(tmp_path: Path) -> None:
    questions = {"questions": [ASKED, {**ASKED, "image_id": 3}]}
    folder = place(
        tmp_path / "s", {"q.json": questions, "x_annotations.json": {"annotations": [ANSWERED]}, "42.png": 42}
    )
    convert("vqa", folder / "q.json", out=tmp_path / "out", progress=False)
    assert (
        (tmp_path / "out/not_converted.txt")
        .read_text()
        .strip()
        .endswith("0 images below " + f"{folder} have the number 3")
    )
    boxes = {"images": [{"id": 1, "file_name": "42.png"}], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}
    place(folder, {"q.json": boxes})
    with pytest.raises(InputError, match="nothing to convert"):
        convert("coco-captions", folder / "q.json", out=tmp_path / "boxes", progress=False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.json": [], "b.json": []}, "has no layout that is recognized: name a file in it"),
        ({"a.json": [{"text": "x"}]}, "has no layout that is recognized"),
        ({"notes.txt": "x"}, "has no layout that is recognized"),
        ({}, "has no layout that is recognized"),
    ],
)
def test_what_is_not_recognized(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(InputError, match=message):
        recognize(place(tmp_path / "source", files))


def test_questions_without_answers_are_kept_for_predict(tmp_path: Path) -> None:
    records = [{"image": "7.png", "question": "What?"}, {"image": "7.png", "question": "Which?", "answer": "Red."}]
    folder = place(tmp_path / "source", {"7.png": 7, "a.json": records})
    convert(folder / "a.json", out=tmp_path / "out", reading=Reading(unanswered=True), progress=False)
    assert turns(tmp_path / "out") == [(7, "Which?", "Red.")]
    (question,) = read_jsonl(tmp_path / "out/questions.jsonl", prompts=True)
    assert (question.turns[0].user, question.turns[0].assistant, len(question.images)) == ("What?", None, 1)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *unused: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_images_from_the_web(tmp_path: Path) -> None:
    folder = place(tmp_path / "source", {"7.png": 7})
    with served(folder) as address:
        records = [{"image": f"{address}/{name}.png", "question": "What?", "answer": "Red."} for name in (7, 8)]
        place(folder, {"a.json": records})
        convert(folder / "a.json", out=tmp_path / "out", reading=Reading(download=True), progress=False)
    assert turns(tmp_path / "out") == [(7, "What?", "Red.")]
    assert "/8.png: cannot be downloaded: HTTP Error 404" in (tmp_path / "out/not_converted.txt").read_text()


def test_links_that_leave_the_root(tmp_path: Path) -> None:
    place(tmp_path, {"cache/blob": 7})
    folder = place(tmp_path / "source", {"a.json": [{"image": "7.png", "question": "What?", "answer": "Red."}]})
    (folder / "7.png").symlink_to(tmp_path / "cache/blob")
    with pytest.raises(InputError, match=rf"leads out of the image root .*source, to {tmp_path}/cache/blob"):
        convert(folder / "a.json", out=tmp_path / "out", progress=False)
    reading = Reading(allow_links=(tmp_path / "cache",))
    convert(folder / "a.json", out=tmp_path / "out", reading=reading, progress=False)
    assert turns(tmp_path / "out") == [(7, "What?", "Red.")]


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        ("a b.png", "a%20b.png"),
        ("sub/a.png", "sub\\a.png"),
        ("a.PNG", "a.png"),
        ("IMG.PNG", "img.png"),
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
    ],
)
def test_hints_at_images_of_almost_that_name(there: str, asked: str, tmp_path: Path) -> None:
    records = [{"image": asked, "question": "What?", "answer": "Red."}]
    folder = place(tmp_path / "source", {there: 7, "a.json": records})
    with pytest.raises(InputError) as error:
        convert(folder / "a.json", out=tmp_path / "out", progress=False)
    assert str(error.value).endswith(f"no such image, but there is {folder / there}")


def test_layouts_of_videos(make_video: Callable[..., Path], tmp_path: Path) -> None:
    make_video(tmp_path / "videos/up/a.mkv", 4)
    assert recognize(tmp_path / "videos") == ("video-folder", tmp_path / "videos", "1 of its 1 files are videos")

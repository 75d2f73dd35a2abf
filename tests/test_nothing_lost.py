"""Whatever is lost of a random record on the way from another layout to a training, something says so."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v.base.config import Base, Data, Run
from phi3v.base.errors import InputError
from phi3v.base.ranks import ALONE
from phi3v.data.check import check
from phi3v.data.convert import convert
from phi3v.data.processor import Phi3VProcessor
from phi3v.model.loading import load_config
from phi3v.train.feed import read_data

INLINE = "<img>{}</img>"
TAGS = ("<image>", "<|image_pad|>", "[IMG]", "<ImageHere>", "<|vision_start|>", INLINE, "")
KEYS = ("images", "image_path", "imgs", "Image", "file_name", "scans", "picture")
DETAILS = {"tools": ["f"], "objects": [1], "rejected": "x", "kto_tag": False, "choices": ["a"], "license": "MIT"}
LOST = ("nothing", "an image", "all images", "a question", "an answer", "an answer's text")


def learnt_from(record: dict[str, Any], model: Path) -> tuple[int, int, str]:
    """Turns and images that a training learns from, and everything that is said about the rest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for image in ("a.png", "b.png"):
            Image.new("RGB", (8, 8)).save(folder / image)
        (folder / "data.json").write_text(json.dumps([record]))
        try:
            convert("messages", folder / "data.json", out=folder / "out", progress=False)
        except InputError as error:
            return 0, 0, str(error)
        file = folder / "out/train.jsonl"
        findings = check(file, num_workers=0)
        assert findings.ok
        run = Run(base=Base(model=str(model)), data=Data(train=(file,), batch_size=1))
        data = read_data(run, Phi3VProcessor.from_pretrained(model), load_config(model), check_first=True, ranks=ALONE)
        assert data.warnings == list(findings.warnings)  # which are printed, and kept in the run
        turns = [turn for example in data.examples for turn in example.turns]
        assert (len(turns), sum(len(turn.images) for turn in turns)) == (findings.turns, findings.images)
        notes = folder / "out/not_used.txt"
        return (
            findings.turns,
            findings.images,
            "\n".join(findings.warnings) + (notes.read_text() if notes.exists() else ""),
        )


@settings(max_examples=100, deadline=None)
@given(
    names=st.sampled_from([["a.png"], ["a.png", "b.png"]]),
    turns=st.integers(1, 2),
    tag=st.sampled_from(TAGS),
    key=st.sampled_from(KEYS),
    detail=st.sampled_from([None, *DETAILS]),
    lost=st.sampled_from(LOST),
)
def test_what_is_lost_is_said(
    tiny_model_dir: Path, names: list[str], turns: int, tag: str, key: str, detail: str | None, lost: str
) -> None:
    tags = "".join(tag.format(name) for name in names)
    messages = [
        {"role": role, "content": f"{tags if k == 0 and role == 'user' else ''}\n{role} {k}"}
        for k in range(turns)
        for role in ("user", "assistant")
    ]
    listed = {"nothing": names, "an image": names[1:], "all images": []}.get(lost, names)
    if lost in ("a question", "an answer"):
        del messages[-1 if lost == "an answer" else -2]
    elif lost == "an answer's text":
        messages[-1]["content"] = ""
    record = {"messages": messages, key: listed, **({detail: DETAILS[detail]} if detail else {})}
    left, shown, said = learnt_from(record, tiny_model_dir)
    if left:
        assert left == turns
        assert shown == len(names) or "without an image" in said or (not tag and lost == "an image")
        assert detail is None or f"{detail}: 1 record" in said
    else:
        reasons = [lost != "nothing", detail not in (None, "license"), key == "scans" and tag != INLINE]
        assert any(reasons), said
        assert "nothing to convert; " in said


def test_what_whole_records_become(tiny_model_dir: Path) -> None:
    said = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "x"}]
    assert learnt_from({"messages": said, "images": ["a.png", "b.png"]}, tiny_model_dir) == (1, 2, "")

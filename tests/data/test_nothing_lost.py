"""Whatever is lost of a random record on the way from another layout, something says so."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.data.check import check
from phi3v.data.convert import convert

INLINE = "<img>{}</img>"
TAGS = ("<image>", "<|image_pad|>", "[IMG]", "<ImageHere>", "<|vision_start|>", INLINE, "")
KEYS = ("images", "image_path", "imgs", "Image", "file_name", "scans", "picture")
DETAILS = {"tools": ["f"], "objects": [1], "rejected": "x", "kto_tag": False, "choices": ["a"], "license": "MIT"}
LOST = ("nothing", "an image", "all images", "a question", "an answer", "an answer's text")


def converted(record: dict[str, Any]) -> tuple[int, int, str]:
    """Turns and images that are left, and everything that is said about the rest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for image in ("a.png", "b.png"):
            Image.new("RGB", (8, 8)).save(folder / image)
        (folder / "data.json").write_text(json.dumps([record]))
        try:
            convert("messages", folder / "data.json", out=folder / "out", progress=False)
        except InputError as error:
            return 0, 0, str(error)
        findings = check(folder / "out/train.jsonl", num_workers=0)
        assert findings.ok
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
def test_what_is_lost_is_said(names: list[str], turns: int, tag: str, key: str, detail: str | None, lost: str) -> None:
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
    left, shown, said = converted({"messages": messages, key: listed, **({detail: DETAILS[detail]} if detail else {})})
    if left:
        assert left == turns
        assert shown == len(names) or "without an image" in said or (not tag and lost == "an image")
        assert detail is None or f"{detail}: 1 record" in said
    else:
        reasons = [lost != "nothing", detail not in (None, "license"), key == "scans" and tag != INLINE]
        assert any(reasons), said
        assert "nothing to convert; " in said


def test_what_whole_records_become() -> None:
    said = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "x"}]
    assert converted({"messages": said, "images": ["a.png", "b.png"]}) == (1, 2, "")

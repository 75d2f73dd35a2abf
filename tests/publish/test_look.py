"""The look at data before training: what is chosen, what is said of it, and that crops and tokens are the model's."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.cli import main
from phi3v.data.check import check
from phi3v.data.encode import encode
from phi3v.data.image import CROP, hd_padding, hd_transform
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.publish.look import choose, look


def gallery(page: Path) -> dict[str, Any]:
    block = re.search(r'id="gallery">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return json.loads(block[1])


def picture(entry: dict[str, Any], key: str = "src") -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry[key].partition(",")[2]))).convert("RGB")


def test_tokens_and_what_carries_loss(tiny_data: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert look(tiny_data, model=str(tiny_model_dir), out=page) == 0
    found, processor = gallery(page), Phi3VProcessor.from_pretrained(tiny_model_dir)
    encoded = [encode(example, processor) for example in read_jsonl(tiny_data)]
    assert len(found["entries"]) == len(encoded) == 14
    for entry, example in zip(found["entries"], encoded, strict=True):
        learnt = [at for start, end in entry["learnt"] for at in range(start, end)]
        assert entry["tokens"] == example.ids.tolist()
        assert learnt == np.flatnonzero(example.loss_mask).tolist()
        assert len(entry["tokens"]) - len(entry["image_tokens"]) + sum(entry["image_tokens"]) == example.tokens
        assert f"{example.tokens} tokens · {example.crops} crops" in entry["foot"]
    two_turns = found["entries"][-1]
    assert [turn[2] for turn in two_turns["turns"]] == [1, 0]
    assert len(two_turns["learnt"]) == 2
    vocabulary = {int(token): text for token, text in found["vocabulary"].items()}
    words = "".join(vocabulary[token] for token in two_turns["tokens"])
    assert words.startswith("<s><|user|> \n<|image|><s> \nwhat is this<|end|> \n<|assistant|>")


@pytest.mark.parametrize(("size", "num_crops"), [((300, 700), 4), ((640, 480), 16), ((336, 336), 1), ((1000, 90), 4)])
def test_crops_are_those_of_the_transform(size: tuple[int, int], num_crops: int, tmp_path: Path) -> None:
    """At full size, and without loss because a drawing is kept as it is."""
    (tmp_path / "images").mkdir()
    drawn = Image.new("RGB", size, "teal")
    drawn.paste("gold", (10, 10, size[0] // 2, size[1] // 2))
    drawn.save(tmp_path / "images" / "a.png")
    turn = {"images": ["a.png"], "user": "what", "assistant": "a shape"}
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": "a", "conversations": [turn]}))
    assert look(tmp_path / "train.jsonl", num_crops=num_crops, crop_size=CROP) == 0
    (shown,) = gallery(tmp_path / "train.html")["images"]
    hd = hd_transform(drawn, num_crops)
    h, w, _ = hd.shape
    assert (shown["width"], shown["height"], shown["grid"]) == (w, h, [w // CROP, h // CROP])
    assert np.abs(np.asarray(picture(shown), dtype=int) - hd).mean() < 1  # WebP
    left, top, right, bottom = hd_padding(*size, num_crops)
    assert shown["padding"] == [left / w, top / h, right / w, bottom / h]
    inside = hd[top : h - bottom, left : w - right]
    assert (inside != 255).any(axis=2).all()  # nothing of the picture is called padding,
    assert (hd[:top] == 255).all()  # and all that is, is white
    assert (hd[:, w - right :] == 255).all()
    squeezed = np.asarray(Image.fromarray(hd).resize((CROP, CROP), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(np.asarray(picture(shown, "whole"), dtype=int) - squeezed).mean() < 5  # another filter


def test_problems_are_said_at_their_line(tiny_data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "images").symlink_to(tiny_data.parent / "images")
    lines = tiny_data.read_text().splitlines()
    lines[3] = lines[3].replace("blue.png", "gone.png")
    lines[5] = "not json"
    lines[6] = lines[6].replace('"source"', '"origin"')
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert main(["look", str(tmp_path / "train.jsonl"), "--image-root", str(tiny_data.parent / "images")]) == 2
    assert "14 lines, 2 problems, 2 warnings\n" in capsys.readouterr().out
    found = gallery(tmp_path / "train.html")
    bad = {entry["order"]: entry for entry in found["entries"] if entry["group"] == "problem"}
    assert set(bad) == {4, 6}
    assert bad[4]["rows"][0][1].startswith("\N{BALLOT X} ")
    assert bad[4]["rows"][0][1].endswith("gone.png: no such image")
    assert bad[6]["asked"] == "not json"
    assert "tokens" not in found["entries"][0]
    (warned,) = [entry for entry in found["entries"] if entry["group"] == "warning"]
    assert warned["rows"][0] == ["", "! unknown key 'origin' is ignored", "note"]
    text = (tmp_path / "train.html").read_text()
    assert f"{tmp_path / 'train.jsonl'}:4: " in text
    assert "With --model, tokens are counted" in text


def test_of_a_long_file_those_with_problems_come_first(tmp_path: Path) -> None:
    line = json.dumps({"id": "ID", "conversations": [{"user": "what", "assistant": "red"}]})
    lines = [line.replace("ID", f"e{n}") for n in range(100)]
    lines[37] = lines[90] = "broken"
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    findings = check(tmp_path / "train.jsonl", tmp_path)
    assert sorted(choose(findings, 9)) == [0, 14, 28, 37, 43, 57, 71, 85, 90]
    assert choose(findings, 100) == set(range(100))
    assert choose(findings, 1) == {37}


def test_pictures_that_have_no_room_are_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    lines = []
    for n in range(5):
        Image.effect_noise((300, 300), 90).save(tmp_path / "images" / f"{n}.png")
        turn = {"images": [f"{n}.png"], "user": "what", "assistant": "noise"}
        lines.append(json.dumps({"id": f"e{n}", "conversations": [turn]}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    look(tmp_path / "train.jsonl", picture_mb=0.3)
    found = gallery(tmp_path / "train.html")
    bare = sum(entry["images"] == [-1] for entry in found["entries"])
    assert 0 < bare < 5
    assert (
        f"{bare} lack images, which would take more than 0.3 MB (--picture-mb)" in (tmp_path / "train.html").read_text()
    )


def test_flags_that_cannot_be(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--limit 0: must be at least 1"):
        look(tiny_data, limit=0)
    with pytest.raises(InputError, match=r"--out .*: the name of a page ends in .html"):
        look(tiny_data, out=tmp_path / "train.jsonl")
    with pytest.raises(InputError, match=r"its page would replace it"):
        look(tmp_path / "data.html")
    with pytest.raises(InputError, match=r"none.jsonl: No such file"):
        look(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert look(tmp_path / "empty.jsonl") == 2
    assert "The file holds no lines" in (tmp_path / "empty.html").read_text()

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from phi3v.base.errors import InputError
from phi3v.data import check as module
from phi3v.data.check import Findings, Statistics, check, render
from phi3v.data.encode import encode
from phi3v.data.image import EXIF_ORIENTATION
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl


@pytest.fixture(scope="module")
def processor(tiny_processor_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_processor_dir)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, size in {"a.png": (64, 48), "b.jpg": (30, 90), "long.png": (3000, 2)}.items():
        Image.new("RGB", size).save(tmp_path / "images" / name)
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "images" / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    (tmp_path / "images" / "text.png").write_text("not an image")
    return tmp_path / "train.jsonl"


def line(number: int, user: str = "what is this", assistant: str = "red", images: tuple[str, ...] = ()) -> str:
    turn = {"images": list(images), "user": user, "assistant": assistant}
    return json.dumps({"id": f"n{number}", "conversations": [turn]})


GOOD = [
    line(1, images=("a.png",)),
    line(2),
    line(3, "<|image_1|> or <|image_2|>?", images=("a.png", "b.jpg")),
    json.dumps(
        {
            "id": "n4",
            "conversations": [
                {"images": ["a.png"], "user": "what", "assistant": "red"},
                {"user": "and", "assistant": "blue"},
                {"images": ["b.jpg"], "user": "<|image_2|>?", "assistant": "no"},
            ],
        }
    ),
]


def test_good_data(data: Path, processor: Phi3VProcessor) -> None:
    data.write_text("\n".join(GOOD))
    findings = check(data, None, processor)
    assert findings.ok
    assert findings.problems == findings.warnings == ()
    assert (findings.examples, findings.turns, findings.images, findings.image_files) == (4, 6, 5, 2)
    assert findings.text_only == 1
    encoded = [encode(example, processor) for example in read_jsonl(data)]
    for name, values in {
        "tokens": [one.tokens for one in encoded],
        "answer_tokens": [one.num_supervised for one in encoded],
        "crops": [one.crops for one in encoded],
    }.items():
        statistics = getattr(findings, name)
        assert (statistics.mean, statistics.max) == (np.mean(values), max(values))


def test_every_problem_is_reported(data: Path, processor: Phi3VProcessor) -> None:
    bad = {
        3: ("{", "not JSON"),
        4: (line(4, images=("missing.png",)), "missing.png: no such image"),
        5: (line(5, images=("cut.png",)), "cut.png: unreadable image"),
        6: (line(6, images=("text.png",)), "text.png: unreadable image"),
        7: (line(7, images=("long.png",)), "long.png: picture with sides 3000 and 2 is too elongated"),
        8: (line(8, images=("../cut.png",)), "leads out of the image root"),
        9: (line(9, "<|image_1|>", images=("a.png", "b.jpg")), "turn 1: prompt has 1 image tags (1), 2 images"),
        10: (line(10, assistant="  "), "turn 1: the answer is empty"),
        11: (line(11, assistant="see <|image_1|>"), "turn 1: an answer cannot hold an image tag"),
        12: (line(12, "a <|image|>"), "turn 1: the text holds a literal <|image|>"),
        13: (line(13, "what " * 3000), "tokens, more than 2,000"),
        14: (line(14, images=("cut.png",)), "cut.png: unreadable image"),
    }
    data.write_text("\n".join([*GOOD[:2], *(text for text, _ in bad.values())]))
    findings = check(data, None, processor, max_tokens=2000)
    assert not findings.ok
    assert findings.bad_lines == len(findings.problems) == len(bad)
    for problem, (number, (_, expected)) in zip(findings.problems, bad.items(), strict=True):
        assert problem.startswith(f"{data}:{number}: ")
        assert expected in problem
    assert findings.tokens is not None
    assert findings.tokens.histogram[-1][1] == 1  # statistics are of the two good ones


def test_several_problems_of_one_example(data: Path, processor: Phi3VProcessor) -> None:
    turns = [
        {"images": ["missing.png", "text.png"], "user": "<|image_1|>", "assistant": ""},
        {"user": "<|image_7|>", "assistant": "<|image|>"},
    ]
    data.write_text(json.dumps({"id": "1", "conversations": turns}))
    assert len(check(data, None, processor).problems) == 6
    data.write_text(line(1, "<|image_1|>", images=("../cut.png", "a.png")))
    outside, tags = check(data, None, processor).problems
    assert "leads out" in outside
    assert "1 image tags (1), 2 images were given" in tags


def test_warnings(data: Path, processor: Phi3VProcessor) -> None:
    extra = json.dumps({"id": "n1", "licence": "MIT", "conversations": [{"user": "a<|end|>", "assistant": "b"}]})
    data.write_text("\n".join([GOOD[0], extra, extra]))
    findings = check(data, None, processor)
    assert findings.ok
    assert findings.warnings == (
        f"{data}:2: unknown key 'licence' is ignored (and 1 more line)",
        f"{data}:2: id 'n1' is also on line 1 (and 1 more line)",
        f"{data}:2: turn 1: the model will read <|end|> in the text as a control token (and 1 more line)",
    )


def test_workers_find_the_same(data: Path, processor: Phi3VProcessor) -> None:
    data.write_text("\n".join([*GOOD, "{", line(5, images=("cut.png",)), *(line(k) for k in range(6, 700))]))
    alone = check(data, None, processor, num_workers=0)
    assert len(alone.problems) == 2
    assert check(data, None, processor, num_workers=2) == alone
    assert check(data, None, processor) == alone


def test_each_image_is_decoded_once(data: Path, processor: Phi3VProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    original = module.read_picture
    monkeypatch.setattr(module, "read_picture", lambda *arguments: loaded.append(arguments[0]) or original(*arguments))
    (data.parent / "images" / "again.png").symlink_to(data.parent / "images" / "a.png")
    data.write_text("\n".join([*GOOD, *GOOD, line(9, images=("again.png", "./a.png"))]))
    check(data, None, processor)
    assert sorted(Path(path).name for path in loaded) == ["a.png", "b.jpg"]


def test_what_a_viewer_would_show_otherwise(data: Path, processor: Phi3VProcessor) -> None:
    images = data.parent / "images"
    frames = [Image.new("L", (30, 20), shade) for shade in (0, 255)]
    for name in ("moves.gif", "moves.webp", "moves.png", "pages.tif"):
        frames[0].save(images / name, save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    for name in ("turned.jpg", "turned.png", "turned.webp"):
        Image.new("RGB", (30, 20)).save(images / name, exif=exif)
    exif[EXIF_ORIENTATION] = 1
    Image.new("RGB", (30, 20)).save(images / "upright.jpg", exif=exif)
    shown = sorted({file.name for file in images.iterdir()} - {"cut.png", "text.png", "long.png"})
    data.write_text("\n".join(line(number, images=(name,)) for number, name in enumerate([*shown, "turned.jpg"])))
    findings = check(data, None, processor)
    assert findings.ok
    rotated, animated = findings.warnings
    assert f"{data}: 3 image files with an EXIF orientation ({images.resolve()}/turned.jpg, for one)" in rotated
    assert f"{data}: 4 image files with several frames or pages ({images.resolve()}/moves.gif, for one)" in animated


def test_absurdly_large_images(data: Path, processor: Phi3VProcessor) -> None:
    data.write_text(GOOD[0])
    (problem,) = check(data, None, processor, max_pixels=3000).problems
    assert problem.endswith("a.png: 64x48 is more than 3000 pixels")


def test_without_a_processor(data: Path, processor: Phi3VProcessor) -> None:
    data.write_text("\n".join(GOOD))
    findings = check(data, num_crops=4)
    assert findings.tokens is findings.answer_tokens is None
    assert findings.crops == check(data, None, processor).crops
    data.write_text(line(1, "<|image_1|>"))
    assert "0 images were given" in check(data).problems[0]


def test_nothing_in_it(data: Path, processor: Phi3VProcessor) -> None:
    data.write_text("\n\n")
    assert check(data, None, processor).problems == (f"{data}: no examples",)
    with pytest.raises(InputError, match=r"nowhere.jsonl: No such file"):
        check(data.parent / "nowhere.jsonl", None, processor)
    with pytest.raises(InputError, match="--image-root"):
        check(data, data.parent / "nowhere", processor)


def test_problems_cannot_steer_the_terminal(data: Path, processor: Phi3VProcessor) -> None:
    data.write_text("\n".join([line(1, images=("a\x1b[2J\nb.png",)), line(2, "\x1b[2J<|image_1|>")]))
    problems = check(data, None, processor).problems
    assert all(problem.isprintable() for problem in problems)
    assert r"a\x1b[2J\nb.png: no such image" in problems[0]


def test_statistics() -> None:
    values = np.random.default_rng(0).integers(50, 5000, 1000)
    statistics = Statistics.of(values)
    ordered = sorted(values.tolist())
    assert (statistics.p50, statistics.p95, statistics.max) == (ordered[499], ordered[949], ordered[-1])
    assert sum(count for _, count in statistics.histogram) == 1000
    assert statistics.histogram[0][0] == ordered[0]
    lows = [low for low, _ in statistics.histogram]
    for (low, count), high in zip(statistics.histogram, [*lows[1:], 10**9], strict=True):
        assert count == ((values >= low) & (values < high)).sum()
    assert len(lows) <= 12
    assert Statistics.of([7, 7]).histogram == ((7, 2),)


def rendered(findings: Findings) -> str:
    console = Console(width=90, record=True, file=io.StringIO())
    render(findings, console)
    return console.export_text()


def test_render(data: Path, processor: Phi3VProcessor) -> None:
    data.write_text("\n".join([*GOOD, "{", line(6, "[bold]<|image_1|>[/]" + "x" * 200), line(1)]))
    findings = check(data, None, processor)
    text = rendered(findings)
    for problem in findings.problems:
        assert f"{problem}\n" in text  # one line each, not wrapped, no markup read
    assert f"{findings.warnings[0]} (warning)\n" in text
    assert "2 problems on 2 lines" in text
    for part in ("mean", "p50", "p95", "max", "answer tokens", "crops", "█", "2 image files"):
        assert part in text
    data.write_text(GOOD[0])
    assert "✓" in rendered(check(data, None, processor))
    data.write_text("{")
    assert "1 problem on 1 line" in rendered(check(data, None, processor))

from __future__ import annotations

import io
import json
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from phi3v.base.errors import InputError
from phi3v.base.ranks import Ranks
from phi3v.data import check as room
from phi3v.data.check import check, check_lines, overlap, render
from phi3v.data.encode import encode
from phi3v.data.image import EXIF_ORIENTATION, ImageRules
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.data.statistics import Findings


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
    assert findings.problems == ()
    assert findings.warnings == (f"{data}: 1 of 4 examples without an image",)
    assert (findings.examples, findings.turns, findings.images, findings.image_files) == (4, 6, 5, 2)
    assert findings.text_only == 1
    encoded = [encode(example, processor) for example in read_jsonl(data)]
    for name, values in {
        "tokens": [one.tokens for one in encoded],
        "answer_tokens": [one.num_targets for one in encoded],
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
        7: (line(7, images=("long.png",)), "long.png: image with sides 3000 and 2 is too elongated"),
        8: (line(8, images=("../cut.png",)), "leads out of the image root"),
        9: (line(9, "<|image_1|>", images=("a.png", "b.jpg")), "turn 1: prompt has 1 image tags (1), 2 images"),
        10: (line(10, assistant="  "), "turn 1: the answer is missing"),
        11: (line(11, assistant="see <|image_1|>"), "turn 1: an answer cannot hold an image tag"),
        12: (line(12, "a <|image|>"), "turn 1: the text holds a literal <|image|>"),
        13: (line(13, "what " * 3000), "tokens, more than 2,000"),
        14: (line(14, images=("cut.png",)), "cut.png: unreadable image"),
    }
    data.write_text("\n".join([*GOOD[:2], *(text for text, _ in bad.values())]))
    findings = check(data, None, processor, max_tokens=2000)
    assert not findings.ok
    assert findings.bad_lines == tuple(range(2, 2 + len(bad)))
    assert len(findings.problems) == len(bad)
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
    extra = json.dumps({"id": "n1", "license": "MIT", "conversations": [{"user": "a<|end|>", "assistant": "b"}]})
    data.write_text("\n".join([GOOD[0], extra, extra]))
    findings = check(data, None, processor)
    assert findings.ok
    assert findings.warnings == (
        f"{data}: 2 of 3 examples without an image",
        f"{data}:2: unknown key 'license' is ignored (and 1 more line)",
        f"{data}:2: turn 1: the model will read <|end|> in the text as a control token (and 1 more line)",
        f"{data}:2: id 'n1' is also on line 1 (and 1 more line)",
    )
    assert findings.odd_lines == (1, 2)


def test_tags_of_other_models_are_warned_about(data: Path, processor: Phi3VProcessor) -> None:
    tags = ("<image>", "<|image_pad|>", "[IMG]", "<image_2>", "<img>a.png</img>", "![x](a.png)", "<|vision_start|>")
    data.write_text("\n".join(line(k, f"{tag} what", images=("a.png",)) for k, tag in enumerate(tags)))
    findings = check(data, None, processor)
    assert findings.ok
    warned = [
        text.removesuffix(" is read as text: tags for images are <|image_1|>, <|image_2|>, ...")
        for text in findings.warnings
    ]
    assert warned == [f"{data}:{k}: turn 1: {tag}" for k, tag in enumerate(tags, start=1)]
    data.write_text(line(1, "<|image_1|> what: a <b> or a <|im|>", images=("a.png",)))
    assert check(data, None, processor).warnings == ()


def test_a_system_text_is_checked_as_well(data: Path, processor: Phi3VProcessor) -> None:
    record = json.loads(line(1, images=("a.png",)))
    data.write_text("\n".join(json.dumps({**record, "system": text}) for text in ("<|image_1|>", "<|end|>")))
    findings = check(data, None, processor)
    assert findings.problems == (f"{data}:1: a system text cannot hold an image tag",)
    assert findings.warnings[0] == f"{data}:2: the model will read <|end|> in the text as a control token"


def test_workers_find_the_same(data: Path, processor: Phi3VProcessor) -> None:
    data.write_text("\n".join([*GOOD, "{", line(5, images=("cut.png",)), *(line(k) for k in range(6, 700))]))
    alone = check(data, None, processor, num_workers=0)
    assert len(alone.problems) == 2
    assert check(data, None, processor, num_workers=2) == alone
    assert check(data, None, processor) == alone


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are decoded from now on."""
    names: list[str] = []
    read_info = room.read_info
    monkeypatch.setattr(room, "read_info", lambda path: names.append(Path(path).name) or read_info(path))
    return names


def test_each_image_is_decoded_once(data: Path, processor: Phi3VProcessor, decoded: list[str]) -> None:
    (data.parent / "images" / "again.png").symlink_to(data.parent / "images" / "a.png")
    data.write_text("\n".join([*GOOD, *GOOD, line(9, images=("again.png", "./a.png"))]))
    check(data, None, processor)
    assert sorted(decoded) == ["a.png", "b.jpg"]


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
    assert len(findings.odd_lines) == 8
    rotated, animated = findings.warnings
    assert f"{data}: 3 image files with an EXIF orientation (such as turned.jpg)" in rotated
    assert f"{data}: 4 image files with several frames or pages (such as moves.gif)" in animated


def test_images_that_lose_their_content_are_named_with_the_share_and_the_remedy(
    data: Path, processor: Phi3VProcessor
) -> None:
    images = data.parent / "images"
    Image.new("RGBA", (20, 10), (9, 9, 9, 255)).save(images / "opaque.png")
    for name, opaque in {"logo.png": 5, "icon.png": 10}.items():
        image = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
        image.paste((0, 0, 0, 255), (0, 0, 20, opaque))
        image.save(images / name)
    Image.fromarray(np.linspace(1000, 4000, 200).reshape(10, 20).astype(np.uint16)).save(images / "ct.png")
    shown = ("opaque.png", "logo.png", "icon.png", "ct.png", "a.png")
    data.write_text("\n".join(line(number, images=(name,)) for number, name in enumerate(shown)))
    findings = check(data, None, processor)
    assert findings.odd_lines == (1, 3)
    assert findings.warnings == (
        f"{data}: 1 image file with values outside 0..255 (such as ct.png, 100.00% of its pixels): "
        "they are clipped: --image-colors visible scales them",
        f"{data}: 1 image file with transparency (such as logo.png, 50.00% of its pixels): "
        "it is dropped: --image-colors visible lays them on white",
    )
    (detail,) = check_lines(data, None, processor, {3})
    assert list(detail.about_images) == [findings.warnings[0].removeprefix(f"{data}: ")]
    assert check(data, rules=ImageRules(image_colors="visible")).warnings == ()


def test_sizes_are_those_of_images_made_upright(data: Path, tiny_processor_dir: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (900, 300)).save(data.parent / "images" / "turned.jpg", exif=exif)
    data.write_text(line(1, images=("turned.jpg",)))
    for orientation in ("ignore", "apply"):
        upright = Phi3VProcessor.from_pretrained(tiny_processor_dir, 4, orientation)  # type: ignore[arg-type]
        findings, encoded = check(data, None, upright), encode(read_jsonl(data)[0], upright)
        assert encoded.image_sizes == ((336, 1008) if orientation == "ignore" else (1008, 336),)
        assert findings.tokens is not None
        assert findings.tokens.max == encoded.tokens, "and nothing is taken from the other check"
        assert bool(findings.warnings) == (orientation == "ignore")


def test_what_two_files_share_is_counted(data: Path, processor: Phi3VProcessor) -> None:
    images, rng = data.parent / "images", np.random.default_rng(0)
    for name in ("one.png", "two.png", "three.png"):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40, 30), Image.Resampling.BICUBIC).save(images / name)
    (images / "copy.png").write_bytes((images / "one.png").read_bytes())
    Image.open(images / "two.png").save(images / "two.jpg")
    data.write_text("\n".join([line(1, "what", images=("one.png",)), line(2, images=("two.png",)), line(3, "why")]))
    val = data.with_name("val.jsonl")
    shown = [line(7, "what", images=("copy.png",)), line(8, "what", "blue", images=("copy.png",)), line(9, "why")]
    val.write_text("\n".join([*shown, line(10, images=("two.jpg",)), line(11, images=("three.png",))]))
    for _ in range(2):  # checked, and found checked
        trained, asked = check(data, None, processor), check(val, None, processor)
        assert overlap(asked, trained) == [
            f"{val}: 2 of 5 examples are also in {data}",
            f"{val}: 1 of 3 image files (such as {images / 'copy.png'}): {data} shows the same file",
            f"{val}: 1 of 3 image files (such as {images / 'two.jpg'}): {data} shows nearly the same image",
        ]
    val.write_text(line(11, "which", images=("three.png",)))
    assert overlap(check(val, None, processor), trained) == []


def test_absurdly_large_images(data: Path, processor: Phi3VProcessor) -> None:
    Image.new("1", (10_000, 9_000)).save(data.parent / "images" / "large.png")
    data.write_text(line(1, images=("large.png",)))
    (problem,) = check(data, None, processor).problems
    assert problem.endswith("large.png: 10000x9000 is more than 89478485 pixels")


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


def test_some_lines_in_detail(data: Path, processor: Phi3VProcessor) -> None:
    """Counted without blank lines, with all that `check` finds there."""
    data.write_text("\n".join([GOOD[0], "", "{", line(3, images=("cut.png",)), line(4, "a <|end|>"), GOOD[3]]))
    findings = check(data, None, processor)
    assert (findings.num_lines, findings.bad_lines, findings.odd_lines) == (5, (1, 2), (3,))
    assert check_lines(data, None, processor, set()) == []
    broken, cut, odd, good = check_lines(data, None, processor, {1, 2, 3, 4})
    assert (broken.where, broken.raw, broken.example) == (f"{data}:3", b"{\n", None)
    assert cut.example is not None
    assert cut.measure is None
    assert "cut.png: unreadable image" in cut.notes.problems[0]
    assert "control token" in odd.notes.warnings[0]
    assert good.measure is not None
    assert findings.tokens is not None
    assert good.measure.tokens == findings.tokens.max


# -- what an earlier check found ---------------------------------------------------------------------------------------


UNCHANGED = "nothing has changed"


@pytest.fixture
def good(data: Path) -> Path:
    data.write_text("\n".join(GOOD))
    return data


def test_nothing_is_checked_twice(
    good: Path, processor: Phi3VProcessor, decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = check(good, None, processor)
    assert UNCHANGED not in capsys.readouterr().out
    decoded.clear()
    assert check(good, None, processor, max_tokens=10_000) == first
    assert decoded == []
    assert f"{good}: checked on 20" in (said := capsys.readouterr().out)
    assert said.endswith(f"{UNCHANGED}: 4 examples\n")
    assert [file.name for file in (good.parent / "images").glob(".*")] == []


def test_what_has_changed_is_checked_again(
    good: Path, processor: Phi3VProcessor, decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An image, alone; the data, its images not; settings on which the result depends."""
    first = check(good, None, processor)
    decoded.clear()
    Image.new("RGB", (700, 400)).save(good.parent / "images" / "b.jpg")
    larger = check(good, None, processor)
    assert decoded == ["b.jpg"]
    assert larger.crops != first.crops
    (good.parent / "images" / "a.png").write_bytes((good.parent / "images" / "cut.png").read_bytes())
    assert "a.png: unreadable image" in check(good, None, processor).problems[0]
    (good.parent / "images" / "a.png").unlink()
    assert "a.png: no such image" in check(good, None, processor).problems[0]
    Image.new("RGB", (64, 48)).save(good.parent / "images" / "a.png")
    assert check(good, None, processor).ok

    decoded.clear()
    good.write_text("\n".join([*GOOD, line(5, images=("b.jpg",))]))
    assert check(good, None, processor).examples == 5
    assert check(good, num_crops=1).crops != check(good, num_crops=9).crops
    assert decoded == []
    check(good, None, processor)
    assert UNCHANGED not in capsys.readouterr().out
    assert "tokens, more than 300" in check(good, None, processor, max_tokens=300).problems[0]
    assert UNCHANGED not in capsys.readouterr().out


def test_problems_are_found_again_and_good_images_are_not_decoded_again(
    data: Path, processor: Phi3VProcessor, decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data.write_text("\n".join([*GOOD, line(5, images=("cut.png",)), "{"]))
    first = check(data, None, processor)
    decoded.clear()
    assert check(data, None, processor) == first
    assert decoded == ["cut.png"]
    assert UNCHANGED not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "text", "types", "table", "another version"])
def test_a_damaged_stamp_is_replaced(
    damage: str, good: Path, processor: Phi3VProcessor, decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = check(good, None, processor)
    stamp = good.with_name(".train.jsonl.checked.json")
    content = json.loads(stamp.read_text())
    stamp.write_bytes(
        {
            "cut": stamp.read_bytes()[:-20],
            "text": b"\xff",
            "types": json.dumps(content | {"findings": {"path": "x"}}).encode(),
            "table": json.dumps(content | {"images": "AAAA"}).encode(),
            "another version": json.dumps(content | {"checker": "phi3v 0.0.1"}).encode(),
        }[damage]
    )
    decoded.clear()
    assert check(good, None, processor) == first
    assert len(decoded) == 2
    assert check(good, None, processor) == first
    assert capsys.readouterr().out.count(UNCHANGED) == 1


def test_data_that_cannot_be_written_to(
    good: Path, processor: Phi3VProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    good.with_name(".train.jsonl.checked.json").mkdir()  # root may write anywhere else
    assert check(good, None, processor).ok
    assert "note  the next check starts from scratch: cannot write" in capsys.readouterr().out
    assert [file.name for file in good.parent.glob(".*")] == [".train.jsonl.checked.json"]


def test_data_may_be_moved(good: Path, processor: Phi3VProcessor, decoded: list[str]) -> None:
    """The images are not decoded again."""
    good.write_text("\n".join([*GOOD, line(1)]))
    check(good, None, processor)
    moved = good.parent.rename(good.parent.with_name("moved"))
    decoded.clear()
    _, warning = check(moved / "train.jsonl", None, processor).warnings
    assert warning == f"{moved}/train.jsonl:5: id 'n1' is also on line 1"
    assert decoded == []


# -- several ranks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Thread(Ranks):
    """A rank that is a thread."""

    desk: list[Any]
    barrier: threading.Barrier

    def gather(self, items: Sequence[Any]) -> list[list[Any]]:
        self.desk[self.rank] = list(items)
        self.barrier.wait()
        found = list(self.desk)
        self.barrier.wait()
        return found

    def first_does(self, work: Callable[[], Any]) -> Any:
        return self.gather([work()] if self.is_first else [])[0][0]


def together(num: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What every rank returns."""
    desk, barrier = [None] * num, threading.Barrier(num, timeout=20)
    with ThreadPoolExecutor(num) as threads:
        return list(threads.map(lambda rank: work(Thread(rank=rank, num=num, desk=desk, barrier=barrier)), range(num)))


@pytest.mark.parametrize("num", [2, 3])
def test_ranks_share_the_work(
    num: int, data: Path, processor: Phi3VProcessor, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All find the same as one alone; each image and line is checked by one of them, and they meet often."""
    monkeypatch.setattr(room, "PER_MEETING", 2)
    images = []
    for number in range(11):
        Image.new("RGB", (20 + number, 30)).save(data.parent / "images" / f"{number}.png")
        images.append(f"{number}.png")
    lines = [line(number, images=(images[number % 11],)) for number in range(50)]
    lines[7], lines[40] = "{", line(40, images=("cut.png",))
    data.write_text("\n".join(lines))
    alone = check(data, None, processor)
    stamp = data.with_name(".train.jsonl.checked.json")
    stamp.unlink()
    decoded.clear()
    parsed = list[str]()
    check_line = room.Checker.check_line
    monkeypatch.setattr(
        room.Checker, "check_line", lambda self, line, images: parsed.append(line[0]) or check_line(self, line, images)
    )
    assert together(num, lambda ranks: check(data, None, processor, ranks=ranks)) == [alone] * num
    assert sorted(decoded) == sorted([*images, "cut.png"])
    assert sorted(parsed) == sorted(f"{data}:{number}" for number in range(1, 51))
    assert len(alone.problems) == 2

    lines[7] = lines[40] = lines[0].replace("n0", "another")
    data.write_text("\n".join(lines))
    decoded.clear()
    first, *others = together(num, lambda ranks: check(data, None, processor, ranks=ranks))
    assert first.ok
    assert others == [first] * (num - 1)
    parsed.clear()
    assert together(num, lambda ranks: check(data, None, processor, ranks=ranks)) == [first] * num
    assert decoded == parsed == []


def test_a_small_part_of_every_line_stays_in_memory(good: Path, processor: Phi3VProcessor) -> None:
    used = []
    for count in (1_000, 6_000):
        good.write_text("\n".join(line(number, "what is this " * 20, images=("a.png",)) for number in range(count)))
        check(good, None, processor, num_workers=0)  # what is loaded once
        good.with_name(".train.jsonl.checked.json").unlink()
        tracemalloc.start()
        check(good, None, processor, num_workers=0)
        used.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (used[1] - used[0]) / 5_000 < 600, used

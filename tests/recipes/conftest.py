"""Small data sets in the schemas in which the real ones are published, made of generated pictures."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from phi3v.data.image import read_size
from phi3v.data.schema import read_jsonl


@pytest.fixture(scope="session")
def published() -> ModuleType:
    """This module: what writes the data sets."""
    return sys.modules[__name__]


@pytest.fixture
def read() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a jsonl file, which is one `read_jsonl` takes and whose pictures are all there."""

    def lines(file: Path) -> list[dict[str, Any]]:
        for example in read_jsonl(file):
            for image in example.images:
                assert read_size(image) == (20, 16)
        return [json.loads(line) for line in file.read_text().splitlines()]

    return lines


STRING = {"dtype": "string", "_type": "Value"}
IMAGE = {"_type": "Image"}


def picture(number: int, format: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    """A picture that no other number has."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 77)).save(buffer, format)
    return buffer.getvalue()


def sequence(feature: object) -> dict[str, object]:
    return {"feature": feature, "_type": "Sequence"}


FEATURES: Mapping[str, Mapping[str, Any]] = {
    "cauldron": {
        "images": sequence(IMAGE),
        "texts": [{"user": STRING, "assistant": STRING, "source": STRING}],
    },
    "mini": {
        "id": STRING,
        "image": IMAGE,
        "query": dict.fromkeys(("de", "en", "es", "fr", "it"), STRING),
        "answers": sequence(STRING),
        "words": sequence(STRING),
        "bounding_boxes": sequence(sequence({"dtype": "float32", "_type": "Value"}) | {"length": 4}),
        "answer": {
            "match_score": {"dtype": "float64", "_type": "Value"},
            "matched_text": STRING,
            "start": {"dtype": "int64", "_type": "Value"},
            "text": STRING,
        },
    },
}


def write_parquet(files: Sequence[Path], features: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows, evenly over the files, as the Hub keeps them: with their features in the metadata of the schema."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'phi3v[hub]'")
    from pyarrow import parquet

    def arrow(feature: Any) -> Any:
        if isinstance(feature, list):
            return pa.list_(arrow(feature[0]))
        kind = feature.get("_type")
        if kind == "Image":
            return pa.struct({"bytes": pa.binary(), "path": pa.string()})
        if kind == "Sequence":
            return pa.list_(arrow(feature["feature"]), feature.get("length", -1))
        if kind == "Value":
            return pa.type_for_alias(feature["dtype"])
        return pa.struct({name: arrow(part) for name, part in feature.items()})

    schema = pa.schema(
        {name: arrow(feature) for name, feature in FEATURES[features].items()},
        metadata={"huggingface": json.dumps({"info": {"features": FEATURES[features]}})},
    )
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = rows[number * len(rows) // len(files) : (number + 1) * len(rows) // len(files)]
        parquet.write_table(pa.Table.from_pylist(list(part), schema=schema), file, row_group_size=3)


def shards(folder: Path, split: str, total: int) -> list[Path]:
    return [folder / f"{split}-{number:05d}-of-{total:05d}-0123456789abcdef.parquet" for number in range(total)]


def cell(content: bytes) -> dict[str, object]:
    return {"bytes": content, "path": None}


def write_cauldron(
    folder: Path, subset: str, rows: Iterable[tuple[Sequence[bytes], Sequence[tuple[str, str]]]], num_shards: int = 2
) -> None:
    """A subset of HuggingFaceM4/the_cauldron: (pictures, (user, assistant) pairs) of every row."""
    source = {"docvqa": "docvqa", "hateful_memes": "Hateful Memes", "nlvr2": "NLVR2"}[subset]
    made = [
        {
            "images": [cell(content) for content in pictures],
            "texts": [{"user": user, "assistant": assistant, "source": source} for user, assistant in texts],
        }
        for pictures, texts in rows
    ]
    write_parquet(shards(folder / subset, "train", num_shards), "cauldron", made)


def write_mini(folder: Path, train: int = 4, test: int = 2) -> None:
    """nielsr/docvqa_1200_examples. Row n of a split shows picture n (of test n + 100), but row 0 the one of row 1."""
    for split, count, first in (("train", train, 0), ("test", test, 100)):
        rows = [
            {
                "id": f"{split}_{n}",
                "image": cell(picture(first + max(n, 1))),
                "query": {language: f"what is {n} ({language})?" for language in ("de", "en", "es", "fr", "it")},
                "answers": [f"Answer {n}", f"answer {n}"],
                "words": ["a", "b"],
                "bounding_boxes": [[0.0, 0.0, 1.0, 1.0]] * 2,
                "answer": {"match_score": 1.0, "matched_text": "a", "start": 0, "text": "a"},
            }
            for n in range(count)
        ]
        write_parquet(shards(folder / "data", split, 1), "mini", rows)


def write_challenge(folder: Path, pictures: str = "documents") -> None:
    """DocVQA from rrc.cvc.uab.es: of each split three pages with two questions each."""
    (folder / pictures).mkdir(parents=True, exist_ok=True)
    for split, first in (("train", 0), ("val", 50)):
        questions = []
        for number in range(first, first + 3):
            (folder / pictures / f"abcd{number:04d}_1.png").write_bytes(picture(number))
            questions += [
                {
                    "questionId": 10 * number + n,
                    "question": f"what is {n}?",
                    "question_types": ["form", "layout"],
                    "image": f"documents/abcd{number:04d}_1.png",
                    "docId": number,
                    "ucsf_document_id": f"abcd{number:04d}",
                    "ucsf_document_page_no": "1",
                    "answers": [f"{number} {n}", f"{number}, {n}"],
                    "data_split": split,
                }
                for n in range(2)
            ]
        head = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": split}
        (folder / f"{split}_v1.0_withQT.json").write_text(json.dumps({**head, "data": questions}))


def write_memes(folder: Path, dev: str = "dev_seen", train: int = 5, test: int = 3) -> None:
    """The Hateful Memes challenge's own files; every other meme is hateful."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(train)), (dev, range(1000, 1000 + test))):
        lines = []
        for number in numbers:
            (folder / "img" / f"{number:05d}.png").write_bytes(picture(number))
            meme = {"id": number, "img": f"img/{number:05d}.png", "label": number % 2, "text": f"caption {number}"}
            lines.append(json.dumps(meme) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))


def write_nlvr2(
    folder: Path, place: Callable[[str, int], str], splits: Iterable[str] = ("train", "dev", "test1")
) -> None:
    """The release of NLVR2: two sets with two pairs of photographs and two sentences each, a pair of set 0 only one.

    `place(split, directory)` is the folder of a photograph.
    """
    for base, split in enumerate(splits):
        lines = []
        for number, (set_id, pair, sentence) in enumerate((s, p, k) for s in (0, 1) for p in (0, 1) for k in (0, 1)):
            if (set_id, pair, sentence) == (0, 1, 1):
                continue
            stem = f"{split}-{set_id}-{pair}"
            for side in (0, 1):
                file = folder / place(split, set_id + 5) / f"{stem}-img{side}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(picture(100 * base + 10 * set_id + 2 * pair + side, "JPEG"))  # as not all are PNG
            line = {
                "validation": {"77": "True"},
                "sentence": f"sentence {sentence} of set {set_id} holds {{true}}.",
                "left_url": "https://example.com/left.jpg",
                "writer": "103",
                "label": "True" if number % 3 else "False",
                "right_url": "https://example.com/right.jpg",
                "synset": "beer bottle",
                "query": "some beer bottles2",
                "identifier": f"{stem}-{sentence}",
            }
            more = {"directory": set_id + 5} if split == "train" else {"extra_validations": {"56": "True"}}
            lines.append(json.dumps(line | more) + "\n")
        (folder / f"{split}.json").write_text("".join(lines))

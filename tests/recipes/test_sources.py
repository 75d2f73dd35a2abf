from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from phi3v.base.errors import InputError
from phi3v.recipes.sources import (
    CAULDRON_COLUMNS,
    cauldron_source,
    find_file,
    find_images,
    find_parquet,
    image_bytes,
    open_parquet,
    read_lines,
)

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'phi3v[hub]'")


@pytest.fixture
def cauldron(tmp_path: Path, published: ModuleType) -> Path:
    """Ten rows in four files; row n shows picture n."""
    rows = [([published.picture(n)], [(f"q{n}", f"a{n}")]) for n in range(10)]
    published.write_cauldron(tmp_path, "docvqa", rows, num_shards=4)
    return tmp_path


def rows_of(files: list[Path], subset: str, num_images: int) -> None:
    """Reads all rows."""
    source = cauldron_source(files, subset, ["train"], lambda *row: [], num_images=num_images)
    for row in source.rows()[1]:
        source.records(*row)


def found(folder: Path, subset: str = "docvqa") -> list[Path]:
    return find_parquet(folder, "train", CAULDRON_COLUMNS, subset)


@pytest.mark.parametrize("kind", ["cauldron", "mini"])
def test_fixtures_have_the_hub_s_schema(kind: str, tmp_path: Path, published: ModuleType) -> None:
    """`datasets` reads the features from the metadata and finds the columns to be of them."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'phi3v[hub]'")
    writers = {
        "cauldron": lambda: published.write_cauldron(
            tmp_path, "nlvr2", [([published.picture(0)] * 2, [("q", "a")])], 1
        ),
        "mini": lambda: published.write_mini(tmp_path, 1, 1),
    }
    writers[kind]()
    file = next(tmp_path.rglob("*.parquet"))
    data = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert data.features.to_dict() == datasets.Features.from_dict(published.FEATURES[kind]).to_dict()
    images = data[0]["images"] if kind == "cauldron" else [data[0]["image"]]
    assert {image.size for image in images} == {(20, 16)}


def test_rows_come_in_order(cauldron: Path, published: ModuleType) -> None:
    files = found(cauldron)
    num_rows, rows = open_parquet(files, ["images", "texts"])
    listed = list(rows)
    assert num_rows == len(listed) == 10
    assert [number for number, _, _ in listed] == list(range(10))
    assert [row["texts"][0]["user"] for _, _, row in listed] == [f"q{n}" for n in range(10)]
    assert [where for _, where, _ in listed][1:4] == [f"{files[0]}, row 1", f"{files[1]}, row 0", f"{files[1]}, row 1"]
    assert image_bytes(listed[7][2]["images"][0], "") == published.picture(7)


@pytest.mark.parametrize("given", ["", "docvqa"])
def test_a_subset_is_found_from_its_folder_and_from_above(given: str, cauldron: Path, published: ModuleType) -> None:
    published.write_cauldron(cauldron, "nlvr2", [([published.picture(0)] * 2, [("q", "a")])])
    assert [file.parent.name for file in found(cauldron / given)] == ["docvqa"] * 4
    assert found(cauldron / "docvqa", "hateful_memes") == found(cauldron / "docvqa")  # whose it is, its rows tell
    assert found(cauldron, "hateful_memes") == []


def test_files_that_the_hub_converted(cauldron: Path) -> None:
    for number, file in enumerate(found(cauldron)):
        (cauldron / "docvqa" / "train").mkdir(exist_ok=True)
        file.rename(cauldron / "docvqa" / "train" / f"{number:04d}.parquet")
    assert [file.name for file in found(cauldron)] == ["0000.parquet", "0001.parquet", "0002.parquet", "0003.parquet"]
    assert open_parquet(found(cauldron), ["texts"])[0] == 10


def test_folders_that_are_links(cauldron: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("linked")
    (folder / "docvqa").symlink_to(cauldron / "docvqa")
    assert len(found(folder)) == 4


def test_a_missing_file_is_named(cauldron: Path) -> None:
    found(cauldron)[2].rename(cauldron / "docvqa" / "train-00002-of-00004-0123456789abcdef.parquet.incomplete")
    with pytest.raises(
        InputError, match=r"train-00002-of-00004\*.parquet is missing: 3 of the 4 files of the train split"
    ):
        found(cauldron)


def test_two_copies_are_refused(cauldron: Path, published: ModuleType) -> None:
    published.write_cauldron(cauldron / "old", "docvqa", [([published.picture(0)], [("q", "a")])], num_shards=1)
    with pytest.raises(InputError, match=r"the train split lies in both .*docvqa and .*old/docvqa"):
        found(cauldron)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", None])
def test_a_file_that_is_not_whole_is_named(content: bytes | None, cauldron: Path) -> None:
    file = found(cauldron)[1]
    file.write_bytes(file.read_bytes()[:-5] if content is None else content)
    with pytest.raises(InputError, match=r"train-00001-of-00004.*: damaged or not fully downloaded \(") as error:
        found(cauldron)
    assert "\n" not in str(error.value)


def test_damage_in_the_middle_is_named(cauldron: Path) -> None:
    file = found(cauldron)[0]
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"train-00000-of-00004.*: damaged or not fully downloaded"):
        list(open_parquet(found(cauldron), CAULDRON_COLUMNS)[1])


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": "x.png"}, {"bytes": b"", "path": None}])
def test_a_row_without_its_image_is_named(value: dict[str, object] | None) -> None:
    with pytest.raises(InputError, match=r"x.parquet, row 3: there is no image in it"):
        image_bytes(value, "x.parquet, row 3")


def test_rows_of_another_subset_are_refused(cauldron: Path) -> None:
    with pytest.raises(InputError, match=r"row 0: 1 images from docvqa, so this is not the Cauldron's nlvr2 \(2 in"):
        rows_of(found(cauldron), "nlvr2", 2)
    with pytest.raises(InputError, match=r"row 0: 1 images from docvqa, so this is not the Cauldron's hateful_memes"):
        rows_of(found(cauldron), "hateful_memes", 1)


def test_rows_with_other_numbers_of_images_are_refused(tmp_path: Path, published: ModuleType) -> None:
    published.write_cauldron(tmp_path, "nlvr2", [([published.picture(0)] * n, [("q", "a")]) for n in (2, 1)], 1)
    with pytest.raises(InputError, match=r"row 1: 1 images from nlvr2, so this is not the Cauldron's nlvr2 \(2 in"):
        rows_of(found(tmp_path, "nlvr2"), "nlvr2", 2)


def test_without_pyarrow(cauldron: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"reading parquet needs pyarrow: pip install 'phi3v\[hub\]'"):
        found(cauldron)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """It holds about one row group, of which the Hub's files have many."""
    import pyarrow as pa
    from pyarrow import parquet

    size, rows_of_a_group, num_groups = 2**18, 10, 40
    schema = pa.schema({"images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    file = tmp_path / "train-00000-of-00001.parquet"
    with parquet.ParquetWriter(file, schema) as writer:
        for group in range(num_groups):
            rows = [{"images": [{"bytes": bytes([group, n]) * (size // 2)}]} for n in range(rows_of_a_group)]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    before, peak = pa.total_allocated_bytes(), 0
    for _, _, row in open_parquet([file], ["images"])[1]:
        assert len(row["images"][0]["bytes"]) == size
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 4 * rows_of_a_group * size


def test_find_file(tmp_path: Path) -> None:
    for name in ("b/dev.json", "a/dev.json", "deep/er/train.json", ".hidden/test.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_file(tmp_path, "x.json", "dev.json") == tmp_path / "a" / "dev.json"
    (tmp_path / "dev.json").touch()
    assert find_file(tmp_path, "dev.json") == tmp_path / "dev.json"
    assert find_file(tmp_path, "train.json", "test.json") is None


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", r"x.jsonl:3: not JSON"), ("[1]", r"x.jsonl:3: there is no 'id' in it"), ("\udcff", r"x.jsonl:3: not UTF-8")],
)
def test_lines_that_are_none(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(f"{json.dumps({'id': 1})}\n\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        list(read_lines(file, {"id": object}))


def test_find_images(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("one.png", "a/two.png", "a/b/three.jpg", "a/b/other.png"):
        (tmp_path / name).touch()
    wanted = ["two.png", "three.jpg", "one.png"]
    assert find_images(tmp_path, wanted, Path("x")) == {
        "one.png": tmp_path / "one.png",
        "two.png": tmp_path / "a/two.png",
        "three.jpg": tmp_path / "a/b/three.jpg",
    }
    with pytest.raises(InputError, match=r"x.json: 2 of its 3 images are nowhere in .*, like four.png"):
        find_images(tmp_path, ["four.png", "one.png", "six.png"], Path("x.json"))

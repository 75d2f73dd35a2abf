"""How recipes are found, those of ours and the user's own; the template runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from phi3v.base.errors import InputError
from phi3v.recipes import RECIPES, find_recipe, forkme, load_recipe

Read = Callable[[Path], list[dict[str, Any]]]

MINIMAL = """
from dataclasses import dataclass
from phi3v.base.config import Run

@dataclass(frozen=True, kw_only=True)
class Options:
    depth: int = 1

def settings(options=Options()):
    return Run()

def prepare(run, options=Options()):
    return run
"""


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_found(name: str) -> None:
    assert find_recipe(name) is find_recipe(name.replace("-", "_"))
    assert find_recipe(name).__doc__


def test_every_recipe_is_listed() -> None:
    files = {path.stem.replace("_", "-") for path in Path(forkme.__file__).parent.glob("*.py")}
    assert files == {*RECIPES, "forkme", "table", "conversion", "sources", "--init--"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("docvqua", "no recipe docvqua: did you mean docvqa?"),
        ("x", "no recipe x: the recipes are easy-vqa, tiny, docvqa, hateful-memes, nlvr2, ucf101"),
        ("train.jsonl", "no recipe train.jsonl: did you mean --train train.jsonl?"),
        ("my_task.py", "no recipe my_task.py: did you mean --recipe my_task.py?"),
        ("table", "no recipe table"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        find_recipe(name)


@pytest.mark.parametrize("name", [*RECIPES, "forkme"])
def test_the_same_parts_in_the_same_order(name: str) -> None:
    file = Path(forkme.__file__).with_name(f"{name.replace('-', '_')}.py")
    names = re.findall(r"^(?:class |def )?(TABLE|Options|settings|prepare)\b", file.read_text(), re.MULTILINE)
    parts = ["TABLE", "Options", "settings", "prepare"]
    assert names == (parts if name not in ("easy-vqa", "tiny") else parts[1:])


def test_a_recipe_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "my_task.py"
    file.write_text(MINIMAL)
    recipe = load_recipe(file)
    assert recipe.Options(depth=3).depth == 3
    assert recipe.prepare(recipe.settings()) == recipe.settings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--recipe .*my_task.py: no such file; `phi3v recipes forkme` prints a template"),
        ("x = (\n", r"my_task.py:1: '\(' was never closed"),
        ("import json\n\njson.loads('{')", r"my_task.py:3: JSONDecodeError: "),
        ("import phi4v", r"my_task.py:1: ModuleNotFoundError: No module named 'phi4v'"),
        (MINIMAL.replace("def prepare", "def prepair"), r"my_task.py: no recipe without prepare; "),
    ],
)
def test_what_is_wrong_with_it_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "my_task.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        load_recipe(file)


def test_a_recipe_that_is_no_python_file(tmp_path: Path) -> None:
    (tmp_path / "my_task.txt").write_text(MINIMAL)
    with pytest.raises(InputError, match=r"--recipe .*my_task.txt: a recipe is a Python file, its name ends in .py"):
        load_recipe(tmp_path / "my_task.txt")


def test_the_template_runs(tmp_path: Path, published: ModuleType, read: Read) -> None:
    (tmp_path / "pictures").mkdir()
    for split, count in (("train", 3), ("test", 1)):
        lines = ["image,question,answer"]
        for number in range(count):
            (tmp_path / "pictures" / f"{split}{number}.png").write_bytes(published.picture(number))
            lines.append(f'pictures/{split}{number}.png,"what, then, is {number}?",that')
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
    run = forkme.prepare(forkme.settings(), forkme.Options(data_dir=tmp_path, hint="Be short."))
    assert run.data.train == (tmp_path / "phi3v" / "my-task" / "train.jsonl",)
    turn = {"images": ["train/2.png"], "user": "what, then, is 2?\nBe short.", "assistant": "that"}
    assert read(run.data.train[0])[2] == {"id": "train-2", "source": "my-task", "conversations": [turn]}
    assert len(read(tmp_path / "phi3v" / "my-task" / "test.jsonl")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no my-task: expected train.csv and test.csv; found nothing"),
        ("image,question\na.png,b", r"train.csv, line 2: there is no 'answer' in it"),
        ("image,question,answer\na.png,b", r"train.csv, line 2: answer is None, which it cannot be"),
        ("image,question,answer\na.png,b,c", r"train.csv: .*a.png is missing"),
    ],
)
def test_the_template_says_what_is_missing(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        for split in ("train", "test"):
            (tmp_path / f"{split}.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        forkme.prepare(forkme.settings(), forkme.Options(data_dir=tmp_path))


def test_settings_of_a_run_that_was_written_are_read_again(tmp_path: Path) -> None:
    """What a recipe chooses fits in a run folder's config.json."""
    from phi3v.base.runfolder import RunFolder

    for name in RECIPES:
        run = find_recipe(name).settings()
        (tmp_path / "config.json").write_text(json.dumps(run.to_dict()))
        assert RunFolder(tmp_path).config == run

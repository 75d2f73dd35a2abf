"""The docs say what the code says: tables are rendered, links lead somewhere, commands parse, messages exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from original import parser
from phi3v.cli import COMMANDS, main, parse
from phi3v.data.check import check
from phi3v.data.layouts import LAYOUTS
from phi3v.recipes import find_recipe
from phi3v.recipes.table import cells, notes

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [*sorted(REPOSITORY.glob("README*.md")), *sorted(DOCS.glob("*.md"))]
COMING_FROM = sorted(DOCS.glob("from-*.md"))

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def markdown(recipe: ModuleType) -> str:
    """The table of a recipe for a page."""
    head, *rows = cells(recipe.TABLE)
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    lines.append(f"\n{recipe.TABLE.metric} in percent, of {recipe.TABLE.model}.")
    return "\n".join(lines + [f"\n\\* {note}" for note in notes(recipe.TABLE)]) + "\n"


@pytest.mark.parametrize("page", ["recipes.md", "recetas.es.md"])
def test_tables_are_those_of_the_recipes(page: str, refresh_golden: bool) -> None:
    file = DOCS / page
    text = file.read_text(encoding="utf-8")
    marked = r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)"
    rendered = re.sub(marked, lambda m: f"{m[1]}{markdown(find_recipe(m[2]))}{m[3]}", text, flags=re.DOTALL)
    if refresh_golden:
        file.write_text(rendered, encoding="utf-8")
        return
    assert len(re.findall(marked, text, re.DOTALL)) == 4
    assert text == rendered, f"pytest tests/test_docs.py --refresh-golden writes docs/{page} anew"


# -- links -----------------------------------------------------------------------------------------------------------


@every_page
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]+)?\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {slug(heading) for heading in headings}, f"{target}{anchor}"


def slug(heading: str) -> str:
    """A heading as an anchor."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """And nothing on it is fetched from elsewhere."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'phi3v[docs]'")
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs-material or mkdocstrings is not installed: pip install 'phi3v[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    fetched = re.compile(
        r"""<(?:script|img|iframe)[^>]*\bsrc="?https?:|<link[^>]*rel="?stylesheet"?[^>]*href="?https?:"""
    )
    for html in (tmp_path / "site").rglob("*.html"):
        assert not fetched.search(html.read_text(encoding="utf-8")), html
    index = json.loads((tmp_path / "site/search/search_index.json").read_text(encoding="utf-8"))
    assert any("stochastic" in entry["text"] for entry in index["docs"])


# -- commands --------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """The `phi3v ...` lines of a page's code blocks, also those behind torchrun, with continued lines joined."""
    code = re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8"))
    blocks = re.findall(r"^```\w*\n(.*?)^```", code, re.MULTILINE | re.DOTALL) + re.findall(
        r"^    (.+)", code, re.MULTILINE
    )
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [found[1] for line in lines if (found := re.match(r"(?:.* -m )?phi3v (.+)", line))]


EVERY_COMMAND = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), EVERY_COMMAND, ids=lambda text: text[:60])
def test_commands_parse(page: str, command: str) -> None:
    """Every flag and choice of every command in the docs exists. Nothing is run."""
    words = shlex.split(re.split(r" > |  +[a-z]|  # | && | & *$", command)[0], comments=True)
    words = [re.sub(r"[<>]|\$\w+|\$\{\{.*?\}\}", "x", word) for word in words]
    if words[0].startswith("-") or words[0] == "COMMAND":
        pytest.skip("of the whole program")
    for flag in {"--recipe", "--config"} & {*words}:
        at = words.index(flag)
        del words[at : at + 2]  # a file of the reader's own
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0$"):
            parse(words)
    else:
        assert callable(parse(words))


def test_every_command_is_shown_in_the_docs() -> None:
    assert {command.split()[0] for _, command in EVERY_COMMAND} >= {*COMMANDS}


@every_page
def test_flags_in_tables_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands in a column named `phi3v train` is one of its flags, or of a recipe, or another command."""
    with pytest.raises(SystemExit):
        main(["train", "docvqa", "--help"])
    flags = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for table in re.findall(
        r"^\|.*\| `phi3v train` \|.*\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.MULTILINE
    ):
        for row in table.splitlines()[1:]:
            ours = re.split(r"(?<!\\)\|", row)[2]
            named = re.findall(r"`(--[\w-]+|phi3v \w+)[^`]*`", ours)
            for name in named:
                known = name in flags or name.removeprefix("phi3v ") in COMMANDS
                assert known or f"--{name[5:]}" in flags, name


# -- coming from elsewhere -------------------------------------------------------------------------------------------


def test_every_flag_of_the_original_scripts_is_in_the_table() -> None:
    page = (DOCS / "from-original.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `--(\w+)`", page, re.MULTILINE))
    theirs = {action.dest for action in parser("docvqa", find_recipe("docvqa"))._actions} - {"help"}
    assert explained == theirs


CONVERSIONS = [
    (page.name, sample, command)
    for page in COMING_FROM
    for sample, command in re.findall(
        r"^```json\n(.*?)^```\s+(?:^(?!    ).*\s)*?^    phi3v (convert [^\n]+)",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
]


def test_every_other_format_has_a_sample() -> None:
    assert [page for page, *_ in CONVERSIONS] == ["from-2u1.md", "from-llama-factory.md", "from-ms-swift.md"]


LAYOUT_SAMPLES = {
    name: textwrap.dedent(sample)
    for names, sample in re.findall(
        r"^(`[\w-]+`(?:, `[\w-]+`)*): (?:(?!^`|^    ).*\n)+((?:^    .*\n)+)",
        (DOCS / "data.md").read_text(encoding="utf-8").partition("## From other layouts")[2],
        re.MULTILINE,
    )
    for name in re.findall(r"[\w-]+", names)
}


def test_every_layout_has_a_sample() -> None:
    assert {*LAYOUT_SAMPLES, "video-folder"} == {*LAYOUTS}


@pytest.mark.parametrize("layout", sorted({*LAYOUT_SAMPLES} - {"imagefolder", "parquet", "webdataset", "sharegpt"}))
def test_samples_of_layouts_are_recognized_and_converted(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = LAYOUT_SAMPLES[layout]
    name = {"csv": "a.csv", "metadata": "metadata.jsonl"}.get(
        layout, "a.json" if sample.count("]}\n") < 2 else "a.jsonl"
    )
    for number in "123":
        Image.new("RGB", (60, 40)).save(tmp_path / f"{number}.jpg")
    (tmp_path / name).write_text(sample, encoding="utf-8")
    source = tmp_path if layout == "metadata" else tmp_path / name
    assert main(["convert", str(source), "--out", str(tmp_path / "out"), "--unanswered", "--no-progress"]) == 0
    recognized = "sharegpt" if layout == "llava" else layout  # the sample shows both
    assert f"layout {recognized}," in capsys.readouterr().out
    assert not (tmp_path / "out/not_converted.txt").exists()
    lines = [line for file in (tmp_path / "out").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == (2 if layout in ("csv", "coco-captions") else 3)


@pytest.mark.parametrize(("page", "sample", "command"), CONVERSIONS, ids=[page for page, *_ in CONVERSIONS])
def test_data_in_the_format_of_other_tools_is_converted(
    page: str, sample: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the very command of the page, from the very sample, without a line left out."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    Path(words[2]).write_text(sample, encoding="utf-8")
    for name in re.findall(r"[\w/-]+\.jpg", sample):
        file = Path("images") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(file)
    assert main(words) == 0
    assert not Path("data/not_converted.txt").exists()
    findings = check("data/train.jsonl")
    assert findings.ok
    assert findings.images == len(re.findall(r"[\w/-]+\.jpg", sample))


# -- errors ----------------------------------------------------------------------------------------------------------


def test_quoted_messages_occur_in_the_sources() -> None:
    """With anything for `...`: a message that was reworded must be reworded on the page."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    sources = "\n".join(file.read_text(encoding="utf-8") for file in sorted((REPOSITORY / "src").rglob("*.py")))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # texts in several pieces
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(quoted) > 30
    for message in quoted:
        pieces = [piece for piece in message.split("...") if len(piece.strip(" :.,;()")) > 2]
        written = r"[^\n]*?".join(re.escape(piece.strip()) for piece in pieces)
        assert re.search(written, sources), message


# -- the README ------------------------------------------------------------------------------------------------------


def test_both_readmes_have_the_same_commands() -> None:
    english, spanish = (  # comments are translated
        [shlex.split(command, comments=True) for command in commands(REPOSITORY / page)]
        for page in ("README.md", "README.es.md")
    )
    assert english == spanish
    for page in ("README.md", "README.es.md"):
        assert len((REPOSITORY / page).read_text(encoding="utf-8").splitlines()) <= 150, "three screens"

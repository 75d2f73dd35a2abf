"""The docs say what the code says: tables are rendered from the recipes, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phi3v.recipes import find_recipe
from phi3v.recipes.table import markdown

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", ["recipes.md", "recetas.es.md"])
def test_tables_are_those_of_the_recipes(page: str, refresh_golden: bool) -> None:
    file = REPOSITORY / "docs" / page
    text = file.read_text(encoding="utf-8")
    marked = r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)"
    rendered = re.sub(marked, lambda m: f"{m[1]}{markdown(find_recipe(m[2]))}{m[3]}", text, flags=re.DOTALL)
    if refresh_golden:
        file.write_text(rendered, encoding="utf-8")
        return
    assert len(re.findall(marked, text, re.DOTALL)) == 4
    assert text == rendered, f"pytest tests/test_docs.py --refresh-golden writes docs/{page} anew"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target

"""pyproject.toml declares what the sources import, and the sources import what it declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_DEVELOPERS = {"dev", "docs", "fuzz"}

DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # those named unlike their module
NOT_IMPORTED = {
    "ninja": "DeepSpeed compiles its operators with it",
    "py-cpuinfo": "DeepSpeed compiles its operators with it",
}


def normal(name: str) -> str:
    """A distribution's name as PEP 503 normalizes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}  # type: ignore[index]


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether inside a function) of every absolute import; those for type checkers alone are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, inside
        yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def distribution(module: str) -> str:
    if module.startswith("torch.utils.tensorboard"):
        return "tensorboard"
    return normal(DISTRIBUTIONS.get(top := module.partition(".")[0], top))


FOUND = {
    (distribution(module), inside, str(file.relative_to(REPOSITORY)))
    for file in sorted((REPOSITORY / "src").rglob("*.py"))
    for module, inside in imports(ast.parse(file.read_text(encoding="utf-8")))
    if module.partition(".")[0] not in {*sys.stdlib_module_names, "phi3v"}
}
REQUIRED = declared(PROJECT["dependencies"])
OPTIONAL = set().union(
    *(declared(names) for extra, names in PROJECT["optional-dependencies"].items() if extra not in FOR_DEVELOPERS)
)


def test_every_import_is_declared() -> None:
    known = REQUIRED | OPTIONAL
    assert not {(name, file) for name, _, file in FOUND if name not in known}


def test_every_declaration_is_imported() -> None:
    assert (REQUIRED | OPTIONAL) - {name for name, *_ in FOUND} == NOT_IMPORTED.keys()


def test_optional_packages_are_imported_inside_functions() -> None:
    optional = OPTIONAL - REQUIRED
    assert not {(name, file) for name, inside, file in FOUND if name in optional and not inside}

"""Help and errors are made of a command's signature, whatever kinds of parameters it has."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from rich.console import Console
from tyro._errors import on_parse_error
from tyro.conf import OmitArgPrefixes, arg

from phi3v import usage
from phi3v.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """How it is done. And more."""

    way: Literal["short", "long"] = "short"
    """Short or long. A second sentence."""

    often: int | None = None
    """How `often`."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Everything."""

    inner: Inner = field(default_factory=Inner)


def command(
    files: tuple[Path, ...],
    name: str | None = None,
    /,
    *,
    out: Path,
    rate: float = 0.5,
    loud: bool = False,
    checked: bool = True,
    json_file: Annotated[Path | None, arg(name="json")] = None,
    kinds: tuple[Literal["one", "two"], ...] = (),
    everything: OmitArgPrefixes[Annotated[Outer, arg(name="")]] = Outer(),
) -> None:
    """Do it.

    Args:
        files: What it is done to.
        name: Of what.
        out: Where it goes.
        rate: How fast.
        loud: Aloud.
        checked: Checked before.
        json_file: Written there.
        kinds: Of these kinds.
    """


def rendered(common: tuple[str, ...] = ()) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(usage.explain("do", "Do it.", ["do this --out there"], usage.parts_of(command), common))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_every_kind_of_parameter_is_shown() -> None:
    assert rendered() == [
        "do FILES ... [NAME] [flags]",
        "",
        "Do it.",
        "",
        "    do this --out there",
        "",
        "  FILES ...                           What it is done to.",
        "  [NAME]                              Of what.",
        "Flags",
        "  --out PATH                          Where it goes. (required)",
        "  --rate X                            How fast. (0.5)",
        "  --loud                              Aloud.",
        "  --[no-]checked                      Checked before.",
        "  --json PATH                         Written there.",
        "  --kinds one|two ...                 Of these kinds.",
        "How it is done. And more",
        "  --way short|long                    Short or long. A second sentence. (short)",
        "  --often N                           How often.",
    ]


def test_the_common_flags_alone_have_a_sentence_each() -> None:
    lines = rendered(common=("way",))
    assert "  --way short|long                    Short or long. (short)" in lines
    assert not any("--rate" in line for line in lines)
    assert lines[-1] == "do --help-all explains 7 more flags, and these in full."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a", "do: --out is missing; for example: do this"),
        ("a --out b --jsn c", "do has no flag --jsn: did you mean --json?"),
        ("a --out b --no-loud --no-cheked", "do has no flag --no-cheked: did you mean --no-checked?"),
        ("a --out b --kinds one too", "--kinds too: did you mean two? (one, two)"),
        ("a --out b --often x", "--often x: it must be a whole number"),
        ("a --out b --rate", "--rate needs a value"),
    ],
)
def test_errors_are_ours(words: str, message: str) -> None:
    with (
        on_parse_error(usage.refuse("do", "do this", usage.parts_of(command))),
        pytest.raises(InputError) as refused,
    ):
        tyro.cli(command, args=words.split())
    assert str(refused.value) == message


def test_tyro_parses_what_the_help_shows() -> None:
    """The names of flags are made twice; they are the same."""
    for flag in (flag for part in usage.parts_of(command) for flag in part.flags if not flag.positional):
        with on_parse_error(usage.refuse("do", "do this", [])), pytest.raises(InputError) as refused:
            tyro.cli(command, args=["a", flag.name, "--zzz"])
        assert f"no flag {flag.name}" not in str(refused.value)

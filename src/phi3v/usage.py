"""What the command line says of itself: help that fits a screen, and errors that name the nearest right word.

tyro parses. What it parses, the signature of a command and the dataclasses in it, is read here once more, to be shown
in groups: a flag's text is the docstring under its field, or in the function's Args.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import docstring_parser
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from tyro import _errors as events  # tyro's hook for failures; private, hence tyro's upper bound in pyproject.toml

from phi3v.base.errors import InputError

VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
NUMBERS = {"N": "a whole number", "X": "a number"}
NAME_WIDTH = 34  # of the column of flags; a list of choices that does not fit in follows the text


class Flag(NamedTuple):
    """A flag of a command, or a word without one, like the folder in `phi3v report FOLDER`."""

    name: str
    """`--batch-size`, or `MODEL` of a word."""

    value: str
    """What is written behind it, nothing for a switch; of a word, the word."""

    choices: tuple[str, ...]

    text: str
    """What it does."""

    default: Any
    """`inspect.Parameter.empty` if it must be given."""

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")

    @property
    def shown(self) -> str:
        """As the help writes it."""
        if self.positional:
            return self.value if self.default is inspect.Parameter.empty else f"[{self.value}]"
        name = f"--[no-]{self.name[2:]}" if self.default is True else self.name
        return f"{name} {self.value}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Part:
    """Flags that belong together."""

    title: str
    flags: tuple[Flag, ...]


# -- what a command takes ----------------------------------------------------------------------------------------------


def parts_of(command: Callable[..., Any]) -> list[Part]:
    """The flags of a command: its own, then those of every dataclass among its parameters, in their order."""
    hints = typing.get_type_hints(command, include_extras=True)
    texts = _texts(docstring_parser.parse(inspect.getdoc(command) or ""))
    own: list[Flag] = []
    groups: list[Part] = []
    for name, parameter in inspect.signature(command).parameters.items():
        hint, named = _bare(hints[name])
        if dataclasses.is_dataclass(hint):
            groups += parts_of_dataclass(hint, parameter.default)
        else:
            positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
            own.append(_flag(named or name, hint, texts.get(name, ""), parameter.default, positional))
    words = tuple(flag for flag in own if flag.positional)
    flags = tuple(flag for flag in own if not flag.positional)
    parts = [Part(title="", flags=words), Part(title="Flags", flags=flags), *groups]
    return [part for part in parts if part.flags]


def parts_of_dataclass(kind: Any, values: Any) -> Iterator[Part]:
    """A part for every dataclass in `kind` that has flags, with the defaults in `values`."""
    hints = typing.get_type_hints(kind, include_extras=True)
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):  # what a class inherits is explained where it comes from
        texts |= _texts(docstring_parser.parse_from_object(base))
    flags = []
    for field in dataclasses.fields(kind):
        hint, named = _bare(hints[field.name])
        if dataclasses.is_dataclass(hint):
            yield from parts_of_dataclass(hint, getattr(values, field.name))
        else:
            value = getattr(values, field.name)
            flags.append(_flag(named or field.name, hint, texts.get(field.name, ""), value, positional=False))
    if flags:
        yield Part(title=(inspect.getdoc(kind) or "").partition("\n")[0].rstrip("."), flags=tuple(flags))


def _texts(docstring: docstring_parser.Docstring) -> dict[str, str]:
    return {one.arg_name: " ".join((one.description or "").split()) for one in docstring.params}


def _bare(hint: Any) -> tuple[Any, str]:
    """A type without its annotations, and the name that one of them gives the flag."""
    if typing.get_origin(hint) is not Annotated:
        return hint, ""
    inner, *notes = typing.get_args(hint)
    bare, name = _bare(inner)
    return bare, next((note.name for note in notes if getattr(note, "name", None)), name)


def _flag(name: str, hint: Any, text: str, default: Any, positional: bool) -> Flag:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kind = next(option for option in options if option is not type(None))
    many = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if many else kind
    choices = tuple(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else ()
    listed = "|".join(choices)
    value = "" if kind is bool else VALUES.get(kind, "WORD")
    if positional:
        return Flag(name.upper(), f"{name.upper()} ..." if many else name.upper(), choices, text, default)
    name = f"--{name.replace('_', '-')}"
    if choices and len(f"{name} {listed}") + 4 * many <= NAME_WIDTH:
        value = listed
    return Flag(name, f"{value} ..." if many else value, choices, text, default)


# -- help --------------------------------------------------------------------------------------------------------------


def overview(title: str, commands: Mapping[str, str], notes: str) -> Group:
    """All commands with a line each."""
    table = Table.grid(padding=(0, 2))
    for name, purpose in commands.items():
        table.add_row(Text(name, "bold cyan"), purpose)
    return Group(Text(title, "bold"), Text(), table, Text(), Text(notes))


def explain(
    prog: str, purpose: str, examples: Sequence[str], parts: Sequence[Part], common: Sequence[str] = ()
) -> Group:
    """The help of a command: all of its flags, or only the `common` ones, in a sentence each."""
    short = bool(common)
    words = [flag.shown for part in parts for flag in part.flags if flag.positional]
    lines: list[Any] = [Text(" ".join([prog, *words, "[flags]"]), "bold"), Text(), Text(purpose), Text()]
    lines += [*(Text(f"    {example}", "green") for example in examples), Text()]
    left_out = 0
    for part in parts:
        shown = [flag for flag in part.flags if not short or flag.name[2:] in common or flag.positional]
        left_out += len(part.flags) - len(shown)
        if not shown:
            continue
        if part.title:
            lines.append(Text(part.title.replace("`", ""), "bold"))
        lines.append(Padding(_columns((Text(flag.shown, "cyan"), _text(flag, short)) for flag in shown), (0, 0, 0, 2)))
    if left_out:
        lines += [Text(), Text(f"{prog} --help-all explains {left_out} more flags, and these in full.", "bold")]
    return Group(*lines)


def _text(flag: Flag, short: bool) -> Text:
    text = (flag.text.partition(". ")[0].removesuffix(".") + "." if short else flag.text).replace("`", "")
    if flag.choices and flag.choices[0] not in flag.value:
        listed = f"{', '.join(flag.choices)}."
        text = listed if short else f"{text} One of: {listed}"
    if flag.default is inspect.Parameter.empty:
        return Text.assemble(text, ("" if flag.positional else " (required)", "red"))
    if flag.default is None or flag.default == () or isinstance(flag.default, bool):
        return Text(text)
    value = " ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
    return Text.assemble(text, (f" ({value})", "dim"))


def _columns(rows: Iterable[tuple[Text, Text]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=NAME_WIDTH, max_width=NAME_WIDTH)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


# -- errors ------------------------------------------------------------------------------------------------------------


def nearest(word: str, words: Iterable[str], otherwise: str) -> str:
    """ "did you mean X?", or what to say where nothing is near."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def refuse(prog: str, example: str, parts: Sequence[Part]) -> Callable[[events.ParseErrorEvent], None]:
    """A hook for tyro that raises InputError, in our words, for what a command's flags cannot be."""
    flags = {flag.name: flag for part in parts for flag in part.flags}
    names = [name for name in flags if name.startswith("-")]
    names += [f"--no-{name[2:]}" for name in names if not flags[name].value]

    def unknown(word: str) -> NoReturn:
        name = word.partition("=")[0]
        if word.startswith("-"):
            raise InputError(f"{prog} has no flag {name}: {nearest(name, names, f'{prog} --help-all lists them')}")
        hint = f"did you mean --{word}?" if f"--{word}" in names else f"see {prog} --help"
        raise InputError(f"{prog}: {word} is one word too many: {hint}")

    def hook(event: events.ParseErrorEvent) -> None:
        if isinstance(event, events.UnrecognizedArgs):
            unknown(event.tokens[0])
        if isinstance(event, events.MissingArgs):
            if strange := [word for word in event.unrecognized_tokens if word.startswith("-")]:
                unknown(strange[0])
            missing = ", ".join(_name(one.arg) for one in event.missing_arguments)
            raise InputError(f"{prog}: {missing} is missing; for example: {example}")
        if isinstance(event, events.InvalidChoice):
            if event.argument.is_positional():
                unknown(event.value)
            name = _name(event.argument)
            listed = ", ".join(flags[name].choices)
            hint = nearest(event.value, flags[name].choices, "")
            raise InputError(f"{name} {event.value}: {f'{hint} ({listed})' if hint else f'it must be {listed}'}")
        if isinstance(event, events.BadValue):
            if event.argument.is_positional():
                raise InputError(f"{prog}: {_name(event.argument)} is missing; for example: {example}")
            given = "takes no value" if event.reason == "fixed" else "needs a value"
            raise InputError(f"{_name(event.argument)} {given}")
        if isinstance(event, events.InstantiationFailure) and event.argument is not None:
            name, wrong = _name(event.argument), re.findall("'(.*)'", event.message)
            if wrong and name in flags and (kind := NUMBERS.get(flags[name].value)):
                raise InputError(f"{name} {wrong[0]}: it must be {kind}")
            raise InputError(f"{name}: {event.message}")

    return hook


def _name(argument: Any) -> str:
    """Of a switch that can be turned off the first of its two names; of a word its name in capitals, as in the help."""
    name = argument.display_name().partition("/")[0]
    return name if name.startswith("-") else name.upper()


def show(help: Group) -> None:
    Console(highlight=False).print(help)

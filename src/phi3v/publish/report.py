"""`phi3v report`: run folders as one HTML page that needs no network and no other file.

The page says which parts are missing in a run that has not written them: a run can be looked at while it trains.
Several runs share its charts, its tables and its gallery.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from tyro.conf import arg

from phi3v.base.config import check_flags
from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.publish.curves import charts, contestants, facts, histograms, metric_table, style_of
from phi3v.publish.gallery import Options, confusion, gallery
from phi3v.publish.html.page import gallery_in, render, write_page
from phi3v.publish.results import Results

UNKNOWN = "\N{EN DASH}"


def report(
    runs: tuple[Path, ...],
    /,
    *,
    out: Path | None = None,
    options: Annotated[Options, arg(name="")] = Options(),
) -> None:
    """Show one run, or several side by side, on a page: curves, scores, settings, every answer with its images.

    Args:
        runs: Run folders, or folders that `phi3v evaluate` wrote.
        out: The page. Default: report.html in the run folder; of several runs, report.html here.
    """
    check_flags(locals(), report)
    say(f"report  {escape(str(write_report(*runs, out=out, options=options)))}")


def write_report(*folders: Path, out: Path | None = None, options: Options = Options()) -> Path:
    """Write the page of `report` and return its path.

    Raises InputError for a folder that is missing, is no run's, or holds damaged files.
    """
    if not folders:
        raise InputError("report needs a run folder: phi3v report RUN [RUN ...]")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [Results.read(folder, name) for folder, name in zip(folders, names, strict=True)]
    target = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    page = render("report.html.jinja", gallery(runs, options, gallery_in(target)), **_values(runs))
    return write_page(target, page)


def _values(runs: Sequence[Results]) -> dict[str, Any]:
    """What the template shows besides the gallery."""
    scored = contestants(runs)
    return {
        "runs": runs,
        "styles": [style_of(runs, place) for place in range(len(runs))],
        "contestants": scored,
        "facts": [facts(run) for run in runs],
        "charts": charts(runs),
        "metric_table": metric_table(scored),
        "published_notes": dict.fromkeys(run.published.note for run in runs if run.published and run.published.note),
        "same_questions": len({frozenset(line["id"] for line in run.predictions) for run in runs if run.predictions})
        < 2,
        "confusions": [(k, run, confusion(run.predictions)) for k, run in enumerate(runs) if run.predictions],
        "histograms": histograms(runs),
        "differing": _differing(runs),
        "settings": [_sections(run) for run in runs],
    }


# -- settings --------------------------------------------------------------------------------------------------------


def _tree(run: Results) -> dict[str, Any]:
    return {**run.settings, "environment": run.environment}


def _differing(runs: Sequence[Results]) -> list[tuple[str, list[str]]]:
    """(setting, its value in every run) where these are not all the same; the run folder itself does not count."""
    every = [dict(_flat(_tree(run))) for run in runs]
    names = dict.fromkeys(name for one in every for name in one if not name.endswith("keeping.out"))
    table = [(name, [one.get(name, UNKNOWN) for one in every]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def _sections(run: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """(section, rows (key, value)): one section per group of settings, and one of those in no group."""
    plain = [(key, _text(value)) for key, value in run.settings.items() if not isinstance(value, dict)]
    nested = [(key, list(_flat(value))) for key, value in _tree(run).items() if isinstance(value, dict)]
    return [(name, rows) for name, rows in [("run", plain), *nested] if rows]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or UNKNOWN
    return UNKNOWN if value is None else str(value)

"""`phi3v env`: the versions, devices and extras of this machine, to paste into an issue."""

import contextlib
import importlib
import io
import os
from importlib import metadata
from json import dumps

import torch
from packaging.requirements import Requirement

from phi3v.base.errors import InputError, one_line
from phi3v.base.hardware import environment, pick_device

FOR_CONTRIBUTORS = ("dev", "docs", "fuzz")
"""Extras that no command needs."""


def env(*, json: bool = False) -> None:
    """Show versions, devices and the extras that are installed and work.

    Args:
        json: Print JSON.
    """
    facts = collect()
    if json:
        print(dumps(facts, indent=2))
        return
    width = max(len(name) for section in facts.values() for name in section)
    for title, section in facts.items():
        print(title, *(f"  {name:{width}}  {value}" for name, value in section.items()), sep="\n")


def collect() -> dict[str, dict[str, str]]:
    """Return the facts by section and name. Imports every extra that is installed, which takes seconds."""
    facts = environment(pick_device())
    system = {name: str(facts[name]) for name in ("phi3v", "commit", "python", "system", "torch_threads")}
    system["torch build"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    try:
        requirements = [Requirement(line) for line in metadata.requires("phi3v") or ()]
    except metadata.PackageNotFoundError:
        raise InputError("phi3v is not installed: pip install -e . in the checkout") from None
    core = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    extras = {}
    for extra in metadata.metadata("phi3v").get_all("Provides-Extra", []):
        own = [one for one in requirements if one not in core and one.marker and one.marker.evaluate({"extra": extra})]
        if extra not in FOR_CONTRIBUTORS:
            extras[extra] = ", ".join(f"{one.name} {_version(one) or 'not installed'}{_failure(one)}" for one in own)
    packages = {one.name: _version(one) or "not installed" for one in core}
    return {"system": system, "devices": _devices(), "packages": packages, "extras": extras}


def _devices() -> dict[str, str]:
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    devices = {"cpu": f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {memory}"}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.1f} GiB"
        devices[f"cuda:{index}"] = f"{card.name}, compute capability {card.major}.{card.minor}, {memory}"
    return devices


def _version(package: Requirement) -> str | None:
    """Return the installed version, with a remark if phi3v needs another; None if the package is not installed."""
    try:
        version = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return None
    fits = package.specifier.contains(version, prereleases=True)
    return version if fits else f"{version} (phi3v needs {package.specifier})"


def _failure(package: Requirement) -> str:
    """Return ": " and why an installed package cannot be imported, or an empty text."""
    if _version(package) is None:
        return ""
    try:
        folders = [file.parent for file in metadata.files(package.name) or () if file.name == "__init__.py"]
        module = ".".join(min(folders, key=lambda folder: len(folder.parts)).parts)  # azure-ai-ml: azure.ai.ml
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        return one_line(f": {type(error).__name__}: {error}")
    return ""

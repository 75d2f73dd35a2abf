"""`phi3v env`: the versions, devices and extras of this machine, to paste into an issue."""

import os
from importlib import metadata
from json import dumps

import torch
from packaging.requirements import Requirement

from phi3v.base.hardware import environment, pick_device

FOR_CONTRIBUTORS = ("dev", "docs", "fuzz")
"""Extras that no command needs."""


def env(*, json: bool = False) -> None:
    """Show versions, devices and the installed extras.

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
    """Return the facts by section and name."""
    facts = environment(pick_device())
    system = {name: str(facts[name]) for name in ("phi3v", "commit", "python", "system", "torch_threads")}
    system["torch build"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    packages = _versions("")
    extras = {}
    for extra in metadata.metadata("phi3v").get_all("Provides-Extra", []):
        if extra not in FOR_CONTRIBUTORS:
            own = {name: version for name, version in _versions(extra).items() if name not in packages}
            extras[extra] = ", ".join(f"{name} {version}" for name, version in own.items())
    return {"system": system, "devices": _devices(), "packages": packages, "extras": extras}


def _devices() -> dict[str, str]:
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    devices = {"cpu": f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {memory}"}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.1f} GiB"
        devices[f"cuda:{index}"] = f"{card.name}, compute capability {card.major}.{card.minor}, {memory}"
    return devices


def _versions(extra: str) -> dict[str, str]:
    """Return the installed version of each package that phi3v needs with an extra ("": without one)."""
    requirements = [Requirement(line) for line in metadata.requires("phi3v") or ()]
    return {
        package.name: _version(package)
        for package in requirements
        if package.marker is None or package.marker.evaluate({"extra": extra})
    }


def _version(package: Requirement) -> str:
    try:
        version = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return "not installed"
    fits = package.specifier.contains(version, prereleases=True)
    return version if fits else f"{version} (phi3v needs {package.specifier})"

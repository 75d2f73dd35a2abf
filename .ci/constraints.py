"""Print constraints.txt: the installed version of everything that `.[dev]` brings.

torch and what nothing but torch requires are left out: the Makefile's variable TORCH chooses that build. A version that
an early Python 3.11 cannot install is pinned on later ones only.
"""

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
optional = [f"{line}; extra == '{name}'" for name, lines in project["optional-dependencies"].items() for line in lines]
todo, seen, versions = [("phi3v", "dev")], set(), {}
while todo:
    name, extra = todo.pop()
    if name == "torch" or (name, extra) in seen:
        continue
    seen.add((name, extra))
    if name != "phi3v":
        versions[name] = metadata.version(name)
    for line in project["dependencies"] + optional if name == "phi3v" else metadata.requires(name) or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            todo += [(canonicalize_name(needed.name), extra) for extra in ("", *needed.extras)]
print(f"# Tested with torch {metadata.version('torch').partition('+')[0]}. `make constraints` writes this file.")
for name, version in sorted(versions.items()):
    pythons = SpecifierSet(metadata.metadata(name).get("Requires-Python", ""))
    marker = " and ".join(f'python_full_version {python.operator} "{python.version}"' for python in pythons)
    print(f"{name}=={version}" + ("" if "3.11.0" in pythons else f"; {marker}"))

"""`phi3v env`: what a person pastes into an issue."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from phi3v import __version__
from phi3v.cli import main


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation of phi3v with extras: one that works, a broken one, an old one, a missing one."""

    def install(name: str, version: str, source: str, *metadata: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("\n".join([f"Name: {name}", f"Version: {version}", *metadata]))
        (info / "RECORD").write_text(f"{name}/tests/__init__.py,,\n{name}/__init__.py,,\n")

    install("phi3v_works", "3.0", "print('noise')")
    install("phi3v_broken", "2.1", "raise OSError('libnothing.so: no such file')")
    install("phi3v_old", "0.9", "")
    packages = ("works", "broken", "old>=1", "missing")
    extras = [f'Requires-Dist: phi3v_{one}; extra == "{re.sub(">=1", "", one)}"' for one in packages]
    extras += [f"Provides-Extra: {name}" for name in ("works", "broken", "old", "missing", "dev")]
    info = tmp_path / f"phi3v-{__version__}.dist-info"
    info.mkdir()
    text = [f"Name: phi3v\nVersion: {__version__}", "Requires-Dist: torch>=1", "Requires-Dist: transformers", *extras]
    (info / "METADATA").write_text("\n".join([*text, 'Requires-Dist: pytest; extra == "dev"']))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_versions_devices_and_extras(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert printed.err == ""
    assert facts["system"]["phi3v"] == __version__
    assert facts["packages"] == {"torch": torch.__version__, "transformers": transformers.__version__}
    assert re.fullmatch(r"\w.*, \d+ cores, [\d.]+ GiB", facts["devices"]["cpu"])
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()
    assert facts["extras"] == {
        "works": "phi3v_works 3.0",
        "broken": "phi3v_broken 2.1",
        "old": "phi3v_old 0.9 (phi3v needs >=1)",
        "missing": "phi3v_missing not installed",
    }


@pytest.mark.usefixtures("installed")
def test_as_an_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == ["system", "devices", "packages", "extras"]
    assert f"  torch          {torch.__version__}" in lines
    assert "  works          phi3v_works 3.0" in lines

"""Old import paths keep working, with a warning; nothing is imported that was not asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("phi3v.config", "phi3v.base.config", "Run"),
        ("phi3v.convert", "phi3v.data.convert", "convert"),
        ("phi3v.errors", "phi3v.base.errors", "InputError"),
        ("phi3v.evaluate", "phi3v.infer.evaluate", "evaluate"),
        ("phi3v.merge", "phi3v.publish.merge", "merge"),
        ("phi3v.metrics", "phi3v.infer.metrics", "anls"),
        ("phi3v.report", "phi3v.publish.report", "write_report"),
    ],
)
def test_a_moved_module_is_the_new_one_under_its_old_name(old: str, new: str, name: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=rf"{old} is now {new}") as caught:
        module = importlib.import_module(old)
    assert len(caught) == 1
    assert module is importlib.import_module(new)
    assert module.__spec__.name == new
    assert hasattr(module, name)


def test_the_ways_of_importing_a_moved_module() -> None:
    """The warning points at the line that imports."""
    code = "from phi3v.config import Run\nimport phi3v.errors\nfrom phi3v import metrics\n"
    code += "assert phi3v.errors.InputError is phi3v.InputError and Run().data and metrics.anls"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in (1, 2, 3):
        assert f"<string>:{line}: DeprecationWarning: phi3v." in done.stderr


def test_train_is_exported_without_importing_the_loop_early() -> None:
    code = "import sys, phi3v.train.memory; assert 'phi3v.train.loop' not in sys.modules\n"
    code += "from phi3v.train import train; import phi3v.train.loop; assert train is phi3v.train.loop.train"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError):
        from phi3v.train import nothing  # noqa: F401

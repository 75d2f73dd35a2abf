from __future__ import annotations

import pytest

from phi3v.base import console


def test_without_a_terminal_long_work_prints_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress_bar("reading", 2_000, "lines", summary=False) as advance:
        advance(500)
        monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", -1.0)
        advance(700)
    assert capsys.readouterr().out == "reading: 1,200 of 2,000 lines\n"
    with console.progress_bar("reading", 2_000, "lines", show=False) as advance:
        advance(2_000)
    assert capsys.readouterr().out == ""

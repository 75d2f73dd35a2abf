"""Messages stay one short line, whatever is in them."""

from __future__ import annotations

import pytest

from phi3v.base.errors import MAX_LENGTH, InputError


@pytest.mark.parametrize("text", ["x" * 5000, "\0" * 5000, "a\nb\x1b[31m", "\0" * MAX_LENGTH])
def test_a_message_is_one_short_line(text: str) -> None:
    message = str(InputError(text))
    assert message.isprintable()
    assert len(message) <= MAX_LENGTH
    assert message.startswith(("x", "\\x00", "a\\nb\\x1b[31m"))

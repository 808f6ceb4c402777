import io
import logging
import sys

import pytest
from tqdm import tqdm

from rankdyna_trainer.layers.notices import AboveProgressBars


def test_a_line_begins_where_the_bar_was(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    plain, handler = logging.getLogger("tests.notices"), logging.StreamHandler(screen)
    plain.addHandler(handler)
    try:
        with tqdm(total=4, file=screen) as bar:
            bar.update(2)
            AboveProgressBars(plain).warning("%d of %d", 3, 4)
            AboveProgressBars(plain).debug("nobody asked for this")
    finally:
        plain.removeHandler(handler)
    before, _, after = screen.getvalue().partition("3 of 4\n")
    assert before.endswith("\r") and after.startswith("\r") and "0/4" in before and "2/4" in after
    assert "nobody" not in after


def test_a_line_tells_who_logged_it(caplog: pytest.LogCaptureFixture) -> None:
    AboveProgressBars(logging.getLogger("tests.notices")).warning("here")
    assert caplog.records[0].filename == "test_notices.py"

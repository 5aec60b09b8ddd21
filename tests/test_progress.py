"""What a long run says: a bar on a terminal, a line now and then in a log."""

import io

from rich.console import Console

from onnx_fold.base import progress


def test_a_bar_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    with progress.shown(console) as report:
        report("folding", 0, 0)
        report("writing layers.0.attn.q_proj.weight", 250_000_000, 1_000_000_000)
    assert "writing layers.0.attn.q_proj.weight" in text.getvalue()
    assert "0.2/1.0 GB" in text.getvalue()
    assert text.getvalue().endswith("\x1b[2K")  # nothing of it stays


def test_nothing_is_counted_where_nothing_can_be():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    with progress.shown(console) as report:
        report("writing", 1, 2)
        report("checking batch=1 seq=8 [bold], the original", 0, 0)
    (last,) = (line for line in text.getvalue().splitlines() if "[bold]" in line)
    assert "checking batch=1 seq=8 [bold], the original" in last
    assert "bytes" not in last
    assert "━" not in last
    assert "-:--" not in last


def test_lines_in_a_log(monkeypatch):
    """In their own time, so that a step that takes long is seen to go on."""
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.001)
    text = io.StringIO()
    with progress.shown(Console(file=text, width=20)) as report:
        for news in (("folding", 0, 0), ("writing layer 1", 10**9, 4 * 10**9)):
            report(*news)
            seen = len(text.getvalue())
            while text.getvalue().count("\n", seen) < 3:
                pass
    lines = text.getvalue().splitlines()
    assert lines.count("0 s: folding") > 1
    assert lines.count("0 s: writing layer 1: 1.0 GB of 4.0 GB, 25%") > 1


def test_a_short_run_writes_no_line():
    text = io.StringIO()
    with progress.shown(Console(file=text)) as report:
        report("folding", 0, 0)
    assert text.getvalue() == ""


def test_quiet():
    text = io.StringIO()
    for is_terminal in (True, False):
        console = Console(file=text, force_terminal=is_terminal, quiet=True)
        with progress.shown(console) as report:
            report("writing", 1, 2)
    assert text.getvalue() == ""

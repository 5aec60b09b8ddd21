"""What a long run says: a bar on a terminal, a line now and then in a log."""

import io

from rich.console import Console

from onnx_fold import progress


def test_a_bar_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    with progress.shown(console) as report:
        report("folding", 0, 0)
        report("writing layers.0.attn.q_proj.weight", 250_000_000, 1_000_000_000)
    assert "writing layers.0.attn.q_proj.weight" in text.getvalue()
    assert "0.2/1.0 GB" in text.getvalue()
    assert text.getvalue().endswith("\x1b[2K")  # nothing of it stays


def test_lines_in_a_log(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    with progress.shown(Console(file=text, width=20)) as report:
        report("folding", 0, 0)
        for second in range(1, 26):
            now[0] = float(second)
            report(f"writing layer {second}", second * 10**9, 25 * 10**9)
    assert text.getvalue().splitlines() == [
        "writing layer 10: 10.0 GB of 25.0 GB, 40%",
        "writing layer 20: 20.0 GB of 25.0 GB, 80%",
    ]


def test_quiet():
    text = io.StringIO()
    for is_terminal in (True, False):
        console = Console(file=text, force_terminal=is_terminal, quiet=True)
        with progress.shown(console) as report:
            report("writing", 1, 2)
    assert text.getvalue() == ""

"""The page: what is on it, that nothing in it can do harm, and what a browser makes of it."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from helpers import graph, normal

import onnx_fold
from onnx_fold.check.judge import OutputParity
from onnx_fold.check.parity import ParityReport
from onnx_fold.check.proof import Proof
from onnx_fold.engine.cost import Cost, Saving
from onnx_fold.engine.outcome import CandidateReport, LayerReport, StreamReport
from onnx_fold.report.alike import alike, nameless, reasons_of, repeats
from onnx_fold.report.blocks import WIDTH, draw, scale_of
from onnx_fold.report.dots import parity_plot, speed_plot
from onnx_fold.report.fold import FoldReport
from onnx_fold.report.folder import FolderReport
from onnx_fold.report.page import page, write_page
from onnx_fold.speed.timing import BenchReport, Phase, Timing

D, LAYERS = 8, 5
TIMES = "\N{MULTIPLICATION SIGN}"
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def deep():
    """A model of equal blocks: P into M, and two activations that end the streams."""
    body = " ".join(
        f"p{i} = MatMul(x{i}, layers_{i}_p) m{i} = MatMul(p{i}, layers_{i}_m) a{i} = Relu(m{i})"
        f" o{i} = MatMul(a{i}, layers_{i}_o) x{i + 1} = Relu(o{i})"
        for i in range(LAYERS)
    )
    shapes = {"p": (D, D), "m": (D, 2 * D), "o": (2 * D, D)}
    weights = {
        f"layers_{i}_{name}": normal(*shape, seed=i)
        for i in range(LAYERS)
        for name, shape in shapes.items()
    }
    text = f"(float[n, {D}] x0) => (float[n, {D}] x{LAYERS}) {{ {body} }}"
    model = graph(text, **weights)
    for value in [*model.graph.initializers.values()]:
        value.name = value.name.replace("_", ".")
    return onnx_fold.fold(model)


def stream(*layers: tuple[str, str, int, int], folded: str = "", **fields) -> StreamReport:
    """A report with layers ``(name, role, weights, after)``."""
    made = [LayerReport(*layer, output=layer[0]) for layer in layers]
    fold = CandidateReport("merge", folded, 64, -1) if folded else None
    return StreamReport(
        width=D,
        dtype="float",
        writers=[each.name for each in made if each.role != "reader"],
        readers=[each.name for each in made if each.role == "reader"],
        is_closed=True,
        layers=made,
        folded=fold,
        candidates=[fold] if fold else [],
        **fields,
    )


def report(*streams: StreamReport, **fields) -> FoldReport:
    return FoldReport(Saving(Cost(200, 800, 9), Cost(136, 544, 8)), [*streams], **fields)


def timed() -> BenchReport:
    timing = Timing(1.0, 1.5, 2.0, 1e3)
    phases = [
        Phase("prefill", 1, 128, 0, 30, timing, timing, 1.1, 1.05, 1.2),
        Phase("decode", 1, 1, 128, 64, timing, timing, 0.9, 0.85, 0.97),
    ]
    return BenchReport("cpu", 30, 64, None, False, 800, 600, 4 / 3, 1.25, phases)


class Reader(HTMLParser):
    """Checks that tags are closed, and collects them."""

    VOID = frozenset(("meta", "link", "br", "img"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


# --- What is on it --------------------------------------------------------------------------------


def test_a_fold(deep):
    read = Reader(page(deep.report, command="onnx-fold fold m.onnx --html p.html", models="m.onnx"))
    saving = deep.report.saving
    for words in (
        *(
            "same function",
            "m.onnx",
            "onnx-fold fold m.onnx --html p.html",
            f"{TIMES} {LAYERS}",
            "before",
        ),
        f"{saving.before.weights:,} → {saving.after.weights:,}",
        *(f"{LAYERS} of {LAYERS}", "layers.0.p into layers.0.m", "proof in float64", "numpy"),
    ):
        assert words in read.text, words
    assert sum(tag == "figure" for tag, _ in read.tags) == 1, "equal blocks are drawn once"


def test_layers_weigh_what_the_fold_leaves(deep):
    for each in deep.report.folded:
        first, *rest = each.layers
        assert (first.weights, first.weights_after) == (D * D, 0)
        assert all(layer.weights == layer.weights_after for layer in rest)


def test_nothing_folds():
    model = graph(
        f"(float[n, {D}] x) => (float[n, {D}] y)"
        " { h = MatMul(x, A) r = Relu(h) y = MatMul(r, B) }",
        A=normal(D, D),
        B=normal(D, D, seed=1),
    )
    text = Reader(page(onnx_fold.inspect(model))).text
    assert "nothing folds" in text
    assert "unchanged" in text


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_parity_with_a_module():
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).eval()
    result = onnx_fold.export(module, (torch.randn(3, 8),))
    text = Reader(page(result.report)).text
    assert "Parity with the PyTorch module" in text
    assert "1 stream folded, same function" in text
    parity = onnx_fold.verify(module, result.model, args=(torch.randn(3, 8),))
    assert "same function" in Reader(page(parity)).text
    differs = replace(result.report.module, ok=False, reason="output 'y': 0.5", outputs=[])
    text = Reader(page(replace(result.report, module=differs))).text
    assert "not the same function" in text
    assert "output 'y': 0.5" in text


def verdict_on(*streams: StreamReport, **fields) -> str:
    return str(report(*streams, **fields)).splitlines()[0]


def test_the_verdict_comes_first():
    ends = ("a", "writer", 64, 64), ("b", "reader", 64, 64)
    folded = verdict_on(stream(*ends, folded="a into b"))
    assert folded == "1 stream folded: 32.0% of the weights and 1 of 9 operators less."
    assert "1 stream would fold" in verdict_on(stream(*ends, folded="a into b"), is_plan=True)
    assert "no linear layer reads another" in verdict_on()
    assert "layers are quantised" in verdict_on(quantised=["a"])
    assert "did not pass" in verdict_on(taken_back={"merge a into b": "it differs"})
    protected = stream(*ends, reasons=["'a' is protected"])
    assert "most often because 'a' is protected" in verdict_on(protected)
    normed = stream(*ends, reasons=["a norm"], has_norms=True, group="orthogonal")
    assert "norms read its only stream, and no rotation" in verdict_on(normed)
    slow = CandidateReport("rotate", "triangle of a", 9, 4, refused="does not pay in time on cpu")
    rotated = replace(normed, candidates=[slow])
    words = str(report(normed, rotated))
    assert "norms read all 2 streams, so only rotations are left" in words
    assert "--objective" in words
    assert "orthogonal   a norm" in words
    assert "orthogonal: rotations" in Reader(page(report(normed))).text


def test_streams_that_differ_in_further_reasons_share_a_line():
    ends = ("a.0", "writer", 64, 64), ("b.0", "reader", 64, 64)
    left = [stream(*ends, reasons=["'a.0' is read by Softmax", why]) for why in ("one", "two")]
    words = str(report(*left))
    assert "(and 1 alike)" in words
    assert "and 1 more reason" in words
    every = str(report(*left, is_long=True))
    assert "alike)" not in every
    assert "two" in every


def test_why_streams_stayed():
    reasons = [[f"'h{i}' is read by Softmax 'node_{i}'"] for i in range(7)]
    left = [
        stream((f"a.{i}", "writer", 64, 64), (f"b.{i}", "reader", 64, 64), reasons=reasons[i])
        for i in range(7)
    ]
    other = stream(("c", "writer", 32, 32), ("d", "reader", 8, 8), reasons=["'c' is protected"])
    text = Reader(page(report(*left, other))).text
    assert text.count("is read by Softmax") == 3, "with the verdict, in the list, with the streams"
    assert f"{TIMES} 7" in text
    assert "'c' is protected" in text
    assert "Left alone" in page(report(stream(("c", "writer", 9, 9), ("d", "reader", 9, 9))))


def test_a_fold_that_was_taken_back():
    text = Reader(page(report(taken_back={"merge a into b": "the proof rejects it"}))).text
    assert "Taken back" in text
    assert "the proof rejects it" in text


def test_parity(deep):
    parity = deep.report.verification
    text = Reader(page(parity)).text
    assert "same function" in text
    assert parity.outputs[0].name in text
    failed = replace(parity.outputs[0], ok=False, margin=3.0, reason="too far")
    text = Reader(page(ParityReport(False, "output 'y' is too far", outputs=[failed]))).text
    assert "differs output 'y' is too far" in text
    assert "3x its limit: too far" in text


def test_bench():
    text = Reader(page(timed())).text
    for words in ("slower in 1 of 2 phases", "1.100x (1.05-1.20), 30 pairs", "bytes read 1.25x"):
        assert words in text


def test_one_small_file_that_asks_nobody(deep, tmp_path):
    path = tmp_path / "p.html"
    write_page(deep.report, path)
    text = path.read_text()
    assert path.stat().st_size < 100_000
    assert not re.search(r"(?:src|href)=(?!\"data:,)|https?:|@import|url\((?!#)", text)
    assert "<script" not in text
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text


def test_names_of_a_model_are_text():
    evil = report(
        stream((EVIL, "writer", 64, 0), ("b", "reader", 64, 64), folded=f"{EVIL} into b"),
        stream(('" onload="x', "table", 8, 8), ("c", "reader", 8, 8), reasons=[f"'{EVIL}' reads"]),
        quantised=[EVIL],
        taken_back={EVIL: EVIL},
        proof=Proof(unproved={EVIL: EVIL}),
        verification=ParityReport(False, EVIL, outputs=[OutputParity(EVIL, "FLOAT", False, EVIL)]),
    )
    text = page(evil, command=EVIL, models=EVIL)
    read = Reader(text)
    assert "<script" not in text
    assert not any("onload" in attributes for _, attributes in read.tags)
    assert EVIL in read.text
    timing = replace(timed(), notes=[EVIL], environment={EVIL: EVIL})
    assert "<script" not in page(timing)


def test_a_node_called_script(tmp_path):
    model = graph(
        f"(float[n, {D}] x) => (float[n, 5] y) {{ p = MatMul(x, P) y = MatMul(p, M) }}",
        P=normal(D, D),
        M=normal(D, 5),
    )
    model.graph[0].name = EVIL
    text = page(onnx_fold.inspect(model))
    assert "<script" not in text
    assert EVIL in Reader(text).text


def test_a_file_name_that_is_no_text(tmp_path):
    write_page(report(), tmp_path / "p.html", models="a\udcffb")
    assert "a\\udcffb" in (tmp_path / "p.html").read_text()


def test_long_names_and_many_kinds_stay_small():
    kinds = [
        stream(
            (f"{'w' * 5000}.{'x' * i}", "writer", 64 + i, 64 + i),
            ("r", "reader", 9, 9),
            reasons=["x" * i * 1000],
        )
        for i in range(150)
    ]
    text = page(report(*kinds))
    assert len(text) < 1_000_000
    assert "further kinds of streams" in text


def test_without_jinja(monkeypatch):
    from onnx_fold.report import page as module

    module._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(onnx_fold.MissingExtraError, match=r"onnx-fold\[html\]"):
        module.check()


# --- What is alike --------------------------------------------------------------------------------


def test_numbers_are_blotted_out_but_for_columns():
    assert nameless("layers.11.q into layers.10.o") == "layers.#.q into layers.#.o"
    assert nameless("qkv[0:64]") != nameless("qkv[64:128]")


def test_runs_that_repeat():
    def made(kind: str, number: int) -> StreamReport:
        return stream((f"{kind}.{number}", "writer", 4, 4), ("r", "reader", 4, 4))

    kinds = "abcbcbcd"
    found = repeats([made(kind, number) for number, kind in enumerate(kinds)])
    letters = [("".join(each.writers[0][0] for each in run.streams), run.count) for run in found]
    assert letters == [("a", 1), ("bc", 3), ("d", 1)]


def test_alike_streams_and_reasons():
    one = stream(("a.0", "writer", 4, 4), ("b.0", "reader", 4, 4), reasons=["'x1' is read"])
    two = stream(("a.1", "writer", 4, 4), ("b.1", "reader", 4, 4), reasons=["'x2' is read"])
    wider = stream(("a.2", "writer", 8, 8), ("b.2", "reader", 4, 4), reasons=["'x3' is read"])
    assert [each.count for each in alike([one, two, wider])] == [2, 1]
    (reason,) = reasons_of([one, two, wider])
    assert (reason.text, reason.count) == ("'x1' is read", 3)


# --- Where things stand ---------------------------------------------------------------------------


def drawn(*streams: StreamReport, **endings: str):
    (run,) = repeats(streams)
    return draw(run, scale_of(streams), endings)


def test_areas_are_weights():
    drawing = drawn(
        stream(("p", "writer", 4096, 0), ("m", "reader", 16384, 16384), folded="p into m")
    )
    p, m = drawing.boxes
    assert m.width * m.height == pytest.approx(4 * p.width * p.height)
    assert p.is_source
    assert m.is_target
    assert p.height_after == 0
    assert len(drawing.arrows) == 1


def test_what_is_left_of_a_layer_keeps_its_width():
    drawing = drawn(stream(("o", "writer", 400, 100), ("m", "reader", 400, 400), folded="o into m"))
    o, _ = drawing.boxes
    assert o.height_after == pytest.approx(o.height / 4)


def test_a_layer_between_two_streams_is_drawn_once():
    first = stream(("a", "writer", 64, 0), ("b", "reader", 64, 64), folded="a into b")
    second = stream(("b", "writer", 64, 0), ("c", "reader", 80, 80), folded="b into c")
    drawing = drawn(first, second)
    assert [box.name for box in drawing.boxes] == ["a", "b", "c"]
    assert [box.weights_after for box in drawing.boxes] == [0, 0, 80]
    assert len(drawing.arrows) == 2


def test_layers_that_are_alike_are_a_pile():
    experts = [(f"experts.{i}.gate", "reader", 64, 64) for i in range(8)]
    others = [(letter, "reader", 5 + i, 5) for i, letter in enumerate("bcdefghi")]
    drawing = drawn(stream(("p", "writer", 64, 0), *experts, *others, folded="p into all"))
    _, pile, *rest = drawing.boxes
    assert pile.count == 8
    assert rest[-1].name == "4 more"
    assert all(b.width / 2 <= b.x <= WIDTH - b.width / 2 for b in drawing.boxes)


def test_what_stands_between_two_streams():
    first = stream(
        ("t", "table", 64, 64), ("q", "reader", 64, 0), folded="q into t", leads_to=["p"]
    )
    second = stream(("p", "writer", 64, 0), ("m", "reader", 80, 80), folded="p into m")
    words = [word.text for word in drawn(first, second, q="attention cores").words]
    assert words == [f"{D} wide", "attention", f"{D} wide"]


def test_margins_lie_on_a_logarithmic_axis():
    outputs = [
        OutputParity("far", "FLOAT", margin=1e-9),
        OutputParity("limit", "FLOAT", margin=1.0),
        OutputParity("over", "FLOAT", ok=False, margin=1e9),
        OutputParity("exact", "INT64"),
    ]
    plot = parity_plot(Proof(["a"], error=1e-9), ParityReport(True, outputs=outputs), 1e-8)
    places = {row.name: row.place for row in plot.rows}
    (limit,) = plot.lines
    assert places["limit"] == limit.place == 75
    assert places["over"] == 100
    assert places["far"] == places["exact"] == 0
    assert places["proof in float64"] == 50


def test_speed_lies_within_its_axis():
    plot = speed_plot(timed())
    for row in plot.rows:
        assert 0 <= row.low <= row.place <= row.high <= 100
    assert all(0 <= mark.place <= 100 for mark in (*plot.ticks, *plot.lines))


# --- In a browser ---------------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PHONE = 390
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" width="{width}" height="844" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const frame = document.getElementById("page");
  const root = frame.contentDocument.documentElement;
  document.body.innerText = "MEASURED " + JSON.stringify({{
    wide: root.scrollWidth,
    seen: frame.contentWindow.innerWidth,
    pictures: frame.contentDocument.querySelectorAll("figure svg").length,
  }});
}};
</script>
"""


def reports(deep):
    left = stream(("a", "writer", 64, 64), ("b" * 200, "reader", 64, 64), reasons=["no " * 90])
    return {
        "fold": deep.report,
        "plan": replace(deep.report, is_plan=True, verification=None, proof=None),
        "left": report(left),
        "long": report(
            stream(("x" * 300, "writer", 9, 0), ("y", "reader", 9, 9), folded="x" * 300)
        ),
        "parity": deep.report.verification,
        "bench": timed(),
        "folder": FolderReport({"a.onnx": deep.report, "b" * 90: report(left)}, ("config.json",)),
    }


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH to open the page in")
@pytest.mark.parametrize("name", ["fold", "plan", "left", "long", "parity", "bench", "folder"])
def test_on_a_phone(deep, tmp_path, name):
    text = page(reports(deep)[name], command="onnx-fold " + "--option " * 30, models="m" * 100)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=PHONE, page=html.escape(text)))
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"),
            *("--window-size=600,900", "--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    measured = json.loads(re.search(r"MEASURED (\{.*?\})", done.stdout)[1])
    assert "CONSOLE" not in done.stderr, done.stderr
    assert measured["seen"] == PHONE
    assert measured["wide"] <= PHONE, "it scrolls to the side"
    assert (measured["pictures"] > 0) == (name not in ("parity", "bench"))

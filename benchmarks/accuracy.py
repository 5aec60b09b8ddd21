"""Measure how accurate each fold strategy is.

``python benchmarks/accuracy.py`` writes ``docs/accuracy.json`` and ``docs/accuracy.svg`` and brings
the tables of ``docs/accuracy.md`` up to date; ``--quick`` measures the small cases only.

Every figure is an error ratio: the relative error of the folded model over that of the original in
the same precision, both against a wider reference. Two levels are measured. *Streams*: O writes
``x``, Q, K and V read it; the passes fold it and predict the errors of q, k and v. *Models*: whole
skipless transformers, exported, folded and run in ONNX Runtime, errors of the logits by
``onnx_fold.verify``; 16 bits are emulated, each operator's result is rounded. *Deep*: the same for
models of many blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matrices
import numpy as np
import onnx.parser
import onnx_ir as ir
from matrices import KINDS, Matrix, State, StreamWeights

import onnx_fold
from onnx_fold.algebra.basis import MAX_RATIO, Basis, max_ratio
from onnx_fold.algebra.expression import literal
from onnx_fold.engine.candidate import Candidate, Options
from onnx_fold.engine.folding import FoldPass
from onnx_fold.engine.outcome import CandidateReport
from onnx_fold.models.config import SkiplessConfig
from onnx_fold.passes import AbsorbPass, InterpolatePass, MergePass, SelectPass
from onnx_fold.rewriting.selected import SHARES
from onnx_fold.streams.stream import find_streams

if TYPE_CHECKING:
    from onnx_fold.models.skipless import SkiplessTransformer

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Storage types: the names in the tables, and those of torch and onnx_fold."""

SEEDS = {256: 4, 512: 4, 1024: 2, 2048: 1, 4096: 1}
"""Widths of the random streams, and how many of each kind are measured."""

WIDE = 2048
"""Random streams of this width and more are measured in fp16 only, without selection of heads."""

DEPTHS: tuple[tuple[str, int, int, Sequence[str]], ...] = (
    ("gaussian", 512, 8, tuple(DTYPES)),
    ("gaussian", 512, 32, ("fp16",)),
    ("gaussian", 1024, 8, ("fp16",)),
    ("gaussian", 2048, 4, ("fp16",)),
    ("orthogonal", 512, 8, ("fp16",)),
    ("orthogonal", 1024, 32, ("fp32", "fp16")),
)
"""Deep models: weights, width, blocks, storage types."""

RUN = {"batch": 4, "seq": 32}
"""What models are run on: one random input."""

HEAD_DIM = {"char-gqa": 40, "MiniLM": 32}

TARGETS = {"fp32": 4.0, "fp16": 6.0}
"""Largest ratio of MiniLM, merged and interpolated, that the project promises."""

PARTS = ("streams", "models", "deep")
"""What can be measured alone: one stream, whole models, and deep ones."""

DOCS = Path(__file__).parents[1] / "docs"


@dataclass
class StreamResult:
    """Streams of one kind, width and storage type; medians over seeds or layers.

    Attributes:
        weights: Kind of random weights, or the name of a trained model.
        d: Width of the stream.
        dtype: Storage type.
        count: Seeds, or layers of the trained model.
        condition: Condition number of Q, estimated.
        error_original: Relative error of q, k or v, whichever is largest, before the fold.
        ratio: Error after the fold over that, by strategy.
        worst: The largest ratio, by strategy.
        taken: The share of the rows of O that ``fold`` takes, the least of all, by objective.
    """

    weights: str
    d: int
    dtype: str
    count: int
    condition: float
    error_original: float
    ratio: dict[str, float]
    worst: dict[str, float]
    taken: dict[str, float]


@dataclass
class Folded:
    """What one strategy made of a model.

    Attributes:
        error: Relative error of the logits; None if they are not finite.
        ratio: The same over that of the original.
        weights_removed: Elements of initializers.
        squares_removed: The same in units of d².
        folds: Number of streams that each pass folded.
        condition: The largest condition number of what was inverted; None if nothing was.
        top1_agreement: Share of positions with the same largest logit as the original.
        kl_divergence: Of the next token from that of the original, mean, in nats.
    """

    error: float | None
    ratio: float | None
    weights_removed: int
    squares_removed: float
    folds: dict[str, int]
    condition: float | None
    top1_agreement: float | None
    kl_divergence: float | None


@dataclass
class ModelResult:
    """A model in one storage type, folded by each strategy."""

    model: str
    d: int
    blocks: int
    dtype: str
    weights: int
    error_original: float | None = None
    strategies: dict[str, Folded] = field(default_factory=dict)


# --- Streams --------------------------------------------------------------------------------------

SERIAL = """
    <ir_version: 10, opset_import: ["": 23]>
    stream (float[b, t, 1] x) => (float[b, t, n] y) {
        a = MatMul(x, M)
        h = Relu(a)
        s = MatMul(h, O)
        q = MatMul(s, Q)
        k = MatMul(s, K)
        v = MatMul(s, V)
        y = Attention <q_num_heads = %d, kv_num_heads = %d> (q, k, v)
    }
"""
"""An FFN's last two layers and the attention behind it: O writes a stream, Q, K and V read it."""

PAIR = """
    <ir_version: 10, opset_import: ["": 23]>
    stream (float[b, t, n] x) => (float[b, t, m] k, float[b, t, m] v) {
        p = MatMul(x, Q)
        k = MatMul(p, K)
        v = MatMul(p, V)
    }
"""
"""Q stands in for P, and K and V for the layers behind it."""


def measure_stream(stream: StreamWeights, dtype: ir.DataType) -> dict[str, tuple[float, float]]:
    """Errors after and before the fold, as the passes predict them, by strategy.

    All weights are stored as ``dtype``. Of an interpolated stream each part that the pass offers
    counts as a strategy.
    """
    width, heads = len(stream.q), (stream.q.shape[1], stream.k.shape[1])
    weights = {"O": stream.o, "Q": stream.q, "K": stream.k, "V": stream.v}
    graphs: list[tuple[str, list[type[FoldPass]]]] = [(PAIR, [MergePass])]
    wide: list[type[FoldPass]] = [AbsorbPass, InterpolatePass]
    if width < WIDE:
        wide.append(SelectPass)
    graphs.append((SERIAL % tuple(size // stream.head_dim for size in heads), wide))
    options = Options(pivot="q", force=True)
    errors: dict[str, tuple[float, float]] = {}
    for text, passes in graphs:
        model = _model(text, {"M": np.ones((1, len(stream.o))), **weights}, dtype)
        (found,) = (each for each in find_streams(model) if each.is_closed)
        for make in passes:
            for whole in make(options).proposals(found):
                assert isinstance(whole, Candidate)
                for candidate in (whole, *whole.in_part()):
                    assert isinstance(candidate, Candidate)
                    report = candidate.judged(found, options, {})
                    error = math.inf if report.error is None else report.error
                    errors[_strategy(report, width)] = error, report.error_original or math.nan
    return errors


def _model(text: str, weights: Mapping[str, Matrix], dtype: ir.DataType) -> ir.Model:
    """The graph ``text`` with those of ``weights`` that it reads, stored as ``dtype``."""
    proto = onnx.parser.parse_model(text)
    for name, weight in weights.items():
        if f", {name})" in text:
            with np.errstate(over="ignore"):  # the error is then infinite
                tensor = ir.tensor(weight.astype(dtype.numpy()), name=name)
            proto.graph.initializer.append(ir.to_proto(tensor))
    return ir.from_proto(proto)


def _strategy(report: CandidateReport, width: int) -> str:
    """The name of the pass, and the share of the rows of O if these are not all."""
    rows = report.text.partition(" ")[0]
    if report.strategy != "interpolate" or int(rows) == width:
        return report.strategy
    return f"{min(SHARES, key=lambda share: abs(share - int(rows) / width)):.0%} of it"


def _taken(run: Mapping[str, tuple[float, float]], dtype: ir.DataType, *, for_size: bool) -> float:
    """The largest share of the rows of O that is within the limit of a stream; 0 if none is."""
    shares = {"interpolate": 1.0, **{f"{share:.0%} of it": share for share in SHARES}}
    most = max_ratio(dtype, for_size=for_size)
    within = (shares[s] for s, (a, b) in run.items() if s in shares and round(a / b, 1) <= most)
    return max(within, default=0.0)


def stream_results(
    name: str, make: Callable[[int], StreamWeights], count: int
) -> Iterator[StreamResult]:
    """Measure ``count`` streams in every storage type."""
    errors: dict[str, list[dict[str, tuple[float, float]]]] = defaultdict(list)
    conditions = []
    width = 0
    for index in range(count):
        stream = make(index)
        width = len(stream.q)
        conditions.append(Basis(literal(stream.q)).condition)
        for short in DTYPES if width < WIDE else ("fp16",):
            errors[short].append(measure_stream(stream, _data_type(DTYPES[short])))
    for short, runs in errors.items():
        ratios = {s: [after / before for after, before in (r[s] for r in runs)] for s in runs[0]}
        yield StreamResult(
            name,
            width,
            short,
            count,
            statistics.median(conditions),
            statistics.median(run["absorb"][1] for run in runs),
            {strategy: statistics.median(values) for strategy, values in ratios.items()},
            {strategy: max(values) for strategy, values in ratios.items()},
            {
                objective: min(
                    _taken(r, _data_type(DTYPES[short]), for_size=for_size) for r in runs
                )
                for objective, for_size in (("speed", False), ("size", True))
            },
        )


def all_streams(counts: Mapping[int, int], trained: Mapping[str, State]) -> Iterator[StreamResult]:
    """Measure random streams, so many of each width, and those of trained models."""
    for width, count in counts.items():
        for kind in KINDS:
            yield from stream_results(kind, _maker(kind, width), count)
    for name, state in trained.items():
        streams = list(matrices.trained_streams(state, HEAD_DIM[name]))
        yield from stream_results(name, streams.__getitem__, len(streams))


def _maker(kind: str, width: int) -> Callable[[int], StreamWeights]:
    return lambda seed: matrices.random_stream(kind, width, seed)


def _data_type(name: str) -> ir.DataType:
    return {
        "float32": ir.DataType.FLOAT,
        "float16": ir.DataType.FLOAT16,
        "bfloat16": ir.DataType.BFLOAT16,
    }[name]


# --- Models ---------------------------------------------------------------------------------------


STRATEGIES: dict[str, dict[str, Any]] = {
    "paper": {"strategy": "absorb", "pivot": "q", "force": True},
    "merge + interpolate": {"strategy": "interpolate", "force": True},
    "merge + select": {"strategy": "select", "force": True},
    "automatic": {},
    "size": {"objective": "size"},
}
"""Options of ``fold``: the paper's own, merge with another pass, whatever error is predicted; and
what is chosen by itself, for speed and for size."""

DEEP = ("paper", "automatic")
"""The strategies that deep models are folded by."""


def measure_model(
    name: str,
    model: SkiplessTransformer,
    dtypes: Iterable[str] = DTYPES,
    names: Iterable[str] = STRATEGIES,
) -> Iterator[ModelResult]:
    """Fold and judge a float32 model in each of these storage types, by these strategies."""
    import torch

    from onnx_fold.models.export import export_module

    for short in dtypes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            narrow = copy.deepcopy(model).to(getattr(torch, DTYPES[short]))
            export_module(narrow, path)
            del narrow
            yield measure_file(name, short, model.config, path, names)


def measure_file(
    name: str,
    dtype: str,
    config: SkiplessConfig,
    path: Path,
    names: Iterable[str] = STRATEGIES,
) -> ModelResult:
    """Fold and judge a model that is stored as ``dtype``."""
    width = config.hidden_size
    result: ModelResult | None = None
    for strategy in names:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "folded.onnx")
            folded = onnx_fold.fold(path, output=file, verify=False, **STRATEGIES[strategy])
            parity = onnx_fold.verify(path, file, emulate=dtype != "fp32", shapes=RUN)
        logits = parity.outputs[0]
        saving, done = folded.report.saving, folded.report.folded
        if result is None:
            result = ModelResult(
                name, width, config.num_hidden_layers, dtype, saving.before.weights
            )
            result.error_original = logits.error_original
        taken = [stream.folded for stream in done if stream.folded is not None]
        passes = [each.strategy for each in taken]
        conditions = [each.condition for each in taken if each.condition is not None]
        result.strategies[strategy] = Folded(
            error=logits.error_folded,
            ratio=logits.ratio,
            weights_removed=saving.weights,
            squares_removed=saving.weights / width**2,
            folds={each: passes.count(each) for each in dict.fromkeys(passes)},
            condition=max(conditions, default=None),
            top1_agreement=logits.top1_agreement,
            kl_divergence=logits.kl_divergence,
        )
    assert result is not None
    return result


def random_model(width: int, init: str, blocks: int = 2) -> SkiplessTransformer:
    """GQA, a GLU that is linear in scale; f and the heads as in Mistral-7B."""
    from onnx_fold.models.skipless import SkiplessTransformer

    return SkiplessTransformer(
        SkiplessConfig(
            vocab_size=2 * width,  # wide enough that merging O and the head would save nothing
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 256,
            head_dim=64,
            intermediate_size=7 * width // 2,
            activation="sigmoid",
            init="gaussian" if init == "gaussian" else "orthogonal",
        )
    )


def char_gqa_model(state: State) -> SkiplessTransformer:
    """The small trained model that the package ships."""
    import torch

    from onnx_fold.models.skipless import SkiplessTransformer
    from onnx_fold.models.train import CONFIG

    model = SkiplessTransformer(CONFIG)
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()})
    return model


def all_models(quick: bool, trained: Mapping[str, State]) -> Iterator[ModelResult]:
    """Measure random models, and trained ones."""
    yield from measure_model("gaussian", random_model(256, "gaussian", 1 if quick else 2))
    char_gqa = char_gqa_model(trained["char-gqa"])
    yield measure_file("char-gqa", "fp32", char_gqa.config, matrices.CHAR_GQA)
    if not quick:
        yield from measure_model("char-gqa", char_gqa, ("fp16", "bf16"))
        import minilm

        yield from measure_model("MiniLM", minilm.build(trained["MiniLM"]), ("fp32", "fp16"))


def deep_models(quick: bool) -> Iterator[ModelResult]:
    """Measure random models of many blocks, and two blocks of the shape of Mistral-7B."""
    for kind, width, blocks, dtypes in (("gaussian", 256, 2, ("fp16",)),) if quick else DEPTHS:
        yield from measure_model(kind, random_model(width, kind, blocks), dtypes, DEEP)
    if not quick:
        yield preset("mistral-7b", 2, "fp16")


def preset(name: str, blocks: int, dtype: str) -> ModelResult:
    """A preset with Gaussian weights, drawn as they are written."""
    from onnx_fold.models.export import export
    from onnx_fold.models.presets import PRESETS

    config = replace(PRESETS[name], num_hidden_layers=blocks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export(name, path, layers=blocks, dtype=DTYPES[dtype])
        return measure_file(name, dtype, config, path, DEEP)


def targets(models: Iterable[ModelResult]) -> list[dict[str, Any]]:
    """Whether MiniLM, merged and interpolated, is as accurate and as small as promised."""
    result = []
    for model in models:
        if model.model == "MiniLM" and model.dtype in TARGETS:
            folded = model.strategies["merge + interpolate"]
            limit, least = TARGETS[model.dtype], 2 * model.blocks - 1
            met = folded.ratio is not None and folded.ratio <= limit
            result.append(
                {
                    "dtype": model.dtype,
                    "ratio": folded.ratio,
                    "ratio_limit": limit,
                    "squares_removed": folded.squares_removed,
                    "squares_least": least,
                    "met": met and folded.squares_removed >= least,
                }
            )
    return result


# --- What is written ------------------------------------------------------------------------------


def environment(command: str) -> dict[str, Any]:
    """Where and when the figures were measured."""
    packages = ("onnx-fold", "numpy", "scipy", "onnx", "onnx-ir", "onnxruntime", "torch")
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(part: str, quick: bool) -> dict[str, Any]:
    """Measure one of ``PARTS``, and return it as JSON-ready data."""
    start = time.process_time()
    trained = {"char-gqa": matrices.char_gqa()}
    if not quick:
        import minilm

        trained["MiniLM"] = minilm.read()
    data: dict[str, Any] = {}
    if part == "streams":
        streams = _shown(all_streams({256: 2} if quick else SEEDS, trained))
        data["streams"] = [_rounded(asdict(each)) for each in streams]
    elif part == "deep":
        data["deep"] = [_rounded(asdict(each)) for each in _shown(deep_models(quick))]
    else:
        models = list(_shown(all_models(quick, trained)))
        data["models"] = [_rounded(asdict(each)) for each in models]
        data["targets"] = [_rounded(each) for each in targets(models)]
    quickly = " --quick" if quick else ""
    data[f"{part}_measured"] = {
        **environment(f"python benchmarks/accuracy.py{quickly} --only {part}"),
        "seconds": round(time.process_time() - start),
    }
    return data


def _shown(results: Iterable[Any]) -> Iterator[Any]:
    for result in results:
        name = getattr(result, "model", None) or result.weights
        print(f"{name}, d = {result.d}, {result.dtype}", flush=True)
        yield result


def _rounded(value: Any) -> Any:
    """Floats to four digits; infinity and NaN, which JSON does not know, to None."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, align, *rows))


def tables(data: Mapping[str, Any]) -> dict[str, str]:
    """Markdown tables by name."""
    return {
        "models": _models_table(data["models"]),
        "deep": _models_table(data["deep"]),
        "streams": _streams_table(data["streams"]),
        **{f"{part} measured": _environment_text(data[f"{part}_measured"]) for part in PARTS},
    }


def _models_table(models: Sequence[Mapping[str, Any]]) -> str:
    names = list(models[0]["strategies"])
    rows = []
    for model in models:
        row = [
            f"{model['model']}, d = {model['d']}, {model['blocks']} blocks",
            model["dtype"],
            _error(model["error_original"]),
        ]
        for name in names:
            folded = model["strategies"][name]
            row.append(f"{_times(folded['ratio'])} ({folded['squares_removed']:.3g})")
        row += [_tokens(model["strategies"][name]) for name in ("paper", "automatic")]
        rows.append(row)
    tokens = ["paper: KL, top-1", "automatic: KL, top-1"]
    return _table(["model", "storage", "original", *names, *tokens], rows)


def _tokens(folded: Mapping[str, Any]) -> str:
    """KL divergence of the next token, and the share of positions at which it is the same."""
    kl, top1 = folded["kl_divergence"], folded["top1_agreement"]
    return "" if kl is None or top1 is None else f"{kl:.0e}, {top1:.1%}"


def _streams_table(streams: Sequence[Mapping[str, Any]]) -> str:
    known = {name for each in streams for name in each["ratio"]}
    names = [name for name in ORDER if name in known]
    rows = []
    for key in dict.fromkeys((each["weights"], each["d"]) for each in streams):
        group = [each for each in streams if (each["weights"], each["d"]) == key]
        cells = [
            " / ".join(_number(each["ratio"][name]) for each in group)
            + f" ({_number(_worst(group, name))})"
            if all(name in each["ratio"] for each in group)
            else ""
            for name in names
        ]
        first = group[0]
        cells += [
            " / ".join(f"{each['taken'][objective]:.0%}" for each in group)
            for objective in ("speed", "size")
        ]
        rows.append([key[0], str(key[1]), str(first["count"]), f"{first['condition']:.1e}", *cells])
    taken = ["taken", "taken for size"]
    return _table(["weights", "d", "streams", "cond(Q)", *names, *taken], rows)


def _environment_text(data: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return (
        f"Measured on {data['date']} by `{data['command']}` in {data['seconds']} s of processor"
        f" time on {data['cpu']} ({data['cores']} cores, {data['platform']}); {versions}."
    )


def _error(value: float | None) -> str:
    return "overflow" if value is None else f"{value:.1e}"


def _times(value: float | None) -> str:
    return "overflow" if value is None else f"{_number(value)}x"


def _number(value: float | None) -> str:
    if value is None:
        return "overflow"
    if value >= 9999.5:
        return f"{value:.0e}"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _worst(group: Iterable[Mapping[str, Any]], strategy: str) -> float | None:
    """The largest ratio; None, which is infinite, if there is one."""
    ratios = [each["worst"][strategy] for each in group]
    return None if None in ratios else max(ratios)


def write_tables(page: Path, data: Mapping[str, Any]) -> None:
    """Put each table between ``<!-- its name -->`` and ``<!-- end -->``."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables(data).items():
        head, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        text = f"{head}{start}{table}\n{end}{tail}"
    page.write_text(text, encoding="utf-8")


ORDER = (
    *("merge", "absorb", "select", "interpolate"),
    *(f"{share:.0%} of it" for share in SHARES),
)
"""The ways to fold a stream, as the table has them."""

COLOURS = {
    "absorb": "#c1440e",
    "paper": "#c1440e",
    "interpolate": "#1f6f8b",
    **{f"{share:.0%} of it": "#7fb3c4" for share in SHARES},
    "merge + interpolate": "#1f6f8b",
    "merge": "#888888",
    "select": "#b08900",
    "merge + select": "#b08900",
    "automatic": "#3a7d44",
}


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Draw the ratios of streams over their width, and those of whole models."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "onnx-fold", "axes.axisbelow": True})
    figure = pyplot.figure(figsize=(9.5, 6.6), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    top, bottom = panels
    _plot_streams(top, data["streams"])
    _plot_models(bottom, data["models"])
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _plot_streams(figure: Any, streams: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    figure.suptitle("One stream: error of q, k, v after the fold / before (median)")
    axes = figure.subplots(1, len(KINDS), sharey=True)
    styles = dict(zip(DTYPES, ("-", "--", ":"), strict=True))
    names = [name for name in ORDER if any(name in each["ratio"] for each in streams)]
    for axis, kind in zip(axes, KINDS, strict=True):
        for dtype, style in styles.items():
            group = [each for each in streams if (each["weights"], each["dtype"]) == (kind, dtype)]
            widths = [each["d"] for each in group]
            for name in names:
                ratios = [each["ratio"].get(name) or math.nan for each in group]
                axis.plot(widths, ratios, style, color=COLOURS[name], marker="o", markersize=2.5)
        axis.set(xscale="log", yscale="log", title=f"{kind} weights", xlabel="d")
        axis.set_xticks(list(SEEDS), [str(width) for width in SEEDS])
        axis.minorticks_off()
        _grid(axis, max_ratio(ir.DataType.FLOAT16, for_size=False))
    axes[0].set_ylabel("error ratio")
    handles = [Line2D([], [], color=COLOURS[name], label=name) for name in names]
    handles += [Line2D([], [], color="black", ls=ls, label=name) for name, ls in styles.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False)


def _plot_models(figure: Any, models: Sequence[Mapping[str, Any]]) -> None:
    figure.suptitle("Whole models: error of the logits after the fold / before")
    axes = figure.subplots(1, len(DTYPES), sharey=True)
    names = list(models[0]["strategies"])
    for axis, dtype in zip(axes, DTYPES, strict=True):
        group = [each for each in models if each["dtype"] == dtype]
        for index, name in enumerate(names):
            offsets = [i + (index - (len(names) - 1) / 2) * 0.16 for i in range(len(group))]
            ratios = [each["strategies"][name]["ratio"] or math.nan for each in group]
            axis.bar(offsets, ratios, 0.16, color=COLOURS.get(name, "#666666"), label=name)
        labels = [f"{each['model']} {each['d']}" for each in group]
        axis.set_xticks(range(len(group)), labels, rotation=40, ha="right")
        axis.set(yscale="log", title=dtype)
        _grid(axis, MAX_RATIO)
    axes[0].set_ylabel("error ratio")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)


def _grid(axis: Any, limit: float) -> None:
    """Lines at the powers of ten, and one at the largest ratio that is taken."""
    axis.grid(visible=True, color="#dddddd", linewidth=0.6)
    axis.axhline(limit, color="black", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Measure, and write what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small random models and char-gqa")
    parser.add_argument("--render", action="store_true", help="draw and write the tables anew only")
    parser.add_argument("--output", type=Path, help="folder to write to; by default docs")
    parser.add_argument("--only", choices=PARTS, help="keep the other parts")
    arguments = parser.parse_args()
    folder = arguments.output or (None if arguments.quick else DOCS)
    file = None if folder is None else folder / "accuracy.json"
    data: dict[str, Any] = {}
    if file is not None and file.exists() and (arguments.only or arguments.render):
        data = json.loads(file.read_text(encoding="utf-8"))
    for part in PARTS:
        if not arguments.render and arguments.only in (None, part):
            data.update(measure(part, arguments.quick))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if any(part not in data for part in PARTS):
        return
    print(*tables(data).values(), sep="\n\n")
    if folder is not None and not arguments.quick:
        plot(data, folder / "accuracy.svg")
        if (page := folder / "accuracy.md").exists():
            write_tables(page, data)


if __name__ == "__main__":
    main()

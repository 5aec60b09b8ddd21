"""Measure what the operators cost that a fold adds, and what other ways of writing it would.

``python benchmarks/operators.py --provider cpu`` times single layers, random weights, in pairs: the
layer as exporters write it against the layer as a fold leaves it. It writes
``docs/operators-cpu.json`` and a table of it, ``docs/operators-cpu.md``. On CUDA weights are in
float16, and ``--cuda-graph`` times captured graphs (``docs/operators-cuda-graph.json``). The
constants of ``onnx_fold.engine.cost.TARGETS`` are read off that table; its last column checks them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from scipy.optimize import nnls

import onnx_fold
from onnx_fold.engine.cost import TARGETS, Target
from onnx_fold.rewriting.rewrite import Work
from onnx_fold.runtime.environment import environment

WIDTHS = 64, 128, 256, 512, 1024, 2048, 4096
TOKENS = 128
DTYPES = {"cpu": np.dtype(np.float32), "cuda": np.dtype(np.float16)}
"""What people run there."""

HEAD = """# What the operators cost that a fold adds

`python benchmarks/operators.py --provider {provider}{option}` times single layers of a stream of
width d with an FFN of 3.5 d, {tokens} tokens in prefill and one in decode, in {dtype}, in pairs
against the layer as exporters write it. More than 1 is faster; in brackets the 95 % interval.
{machine}.

*interpolated* is `Split, MatMul, Add` in the place of `MatMul`, which saves d² of 3.5 d² weights;
*by Slice* and *by Gemm* are other ways to write it; *with Gather* is what it costs where the order
of the hidden value cannot go into the weights before it. *packed* is one product and a Split for
two products that read the same: K and V of a quarter of the width, gate and up. The last column is
what `--target {provider}` expects to be slower.

The target is `{used}`; least squares of the times below give `{fitted}`.

"""


@dataclass(frozen=True)
class Variant:
    """Two ways to write one layer.

    Attributes:
        name: What the second way is called.
        width: Width of the stream, ``d``.
        plain: The layer as exporters write it.
        other: The other way.
        expected: Where the target expects the other way to be slower; None if no fold writes it.
    """

    name: str
    width: int
    plain: ir.Model
    other: ir.Model
    expected: str | None = None


def added(name: str, d: int) -> Work | None:
    """What the fold of that name adds, at width ``d``; None if no fold writes it."""
    f = d * 7 // 2
    known = {
        "interpolated": Work(2, copied=f + d),
        "with Gather": Work(3, copied=f + d, gathered=f),
    }
    return known.get(name)


def layer(
    dtype: np.dtype[Any], inputs: int, body: str, outputs: list[int], **held: np.ndarray
) -> ir.Model:
    """``h = Sigmoid(x)``, then ``body``, then a Sigmoid of each of ``y0, y1, ...``."""
    kind = {"float32": "float", "float16": "float16"}[dtype.name]
    shapes = ", ".join(f"{kind}[b, n, {size}] z{i}" for i, size in enumerate(outputs))
    ends = " ".join(f"z{i} = Sigmoid(y{i})" for i in range(len(outputs)))
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]> layer ({kind}[b, n, {inputs}] x) => ({shapes})'
        f" {{ h = Sigmoid(x) {body} {ends} }}"
    )
    for name, array in held.items():
        array = array.astype(dtype) if array.dtype.kind == "f" else array
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(model)


def _normal(rows: int, columns: int) -> np.ndarray:
    generator = np.random.default_rng([rows, columns])
    return generator.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(rows))


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def interpolated(provider: str, d: int) -> Iterator[Variant]:
    """The ways to write ``h₂ B + h₁`` for ``h O``."""
    f, dtype = d * 7 // 2, DTYPES[provider]
    plain = layer(dtype, f, "y0 = MatMul(h, O)", [d], O=_normal(f, d))
    b, cut = _normal(f - d, d), _ints(f - d, d)
    bounds = {"start": _ints(0), "cut": _ints(f - d), "end": _ints(f), "axis": _ints(-1)}
    split = "g2, g1 = Split<axis = -1>(g, sizes) p = MatMul(g2, B) y0 = Add(p, g1)"
    bodies: dict[str, tuple[str, dict[str, np.ndarray]]] = {
        "interpolated": ("g = Identity(h) " + split, {"sizes": cut}),
        "with Gather": (
            "g = Gather<axis = -1>(h, order) " + split,
            {"sizes": cut, "order": np.random.default_rng(0).permutation(f)},
        ),
        "by Slice": (
            "g2 = Slice(h, start, cut, axis) g1 = Slice(h, cut, end, axis) p = MatMul(g2, B)"
            " y0 = Add(p, g1)",
            bounds,
        ),
        "by Gemm": (
            "r = Reshape(h, flat) g2, g1 = Split<axis = -1>(r, sizes) p = Gemm(g2, B, g1)"
            " s = Shape<end = 2>(h) t = Concat<axis = 0>(s, width) y0 = Reshape(p, t)",
            {"flat": _ints(-1, f), "sizes": cut, "width": _ints(d)},
        ),
    }
    target = TARGETS[provider]
    for name, (body, held) in bodies.items():
        other = layer(dtype, f, body, [d], B=b, **held)
        work = added(name, d)
        expected = None if work is None else target.loses(work, d * d, dtype.itemsize)
        yield Variant(name, d, plain, other, expected)


def packed(provider: str, d: int) -> Iterator[Variant]:
    """One product for two that read the same."""
    dtype = DTYPES[provider]
    for name, width in (("K, V packed", d // 4), ("gate, up packed", d * 7 // 2)):
        left, right = _normal(d, width), _normal(d, width)
        apart = "y0 = MatMul(h, A) y1 = MatMul(h, B)"
        joined = "p = MatMul(h, W) y0, y1 = Split<axis = -1>(p, sizes)"
        both = np.concatenate((left, right), axis=1)
        sizes = _ints(width, width)
        yield Variant(
            name,
            d,
            layer(dtype, d, apart, [width] * 2, A=left, B=right),
            layer(dtype, d, joined, [width] * 2, W=both, sizes=sizes),
        )


def measure(variant: Variant, provider: str, repeats: int, cuda_graph: bool) -> dict[str, Any]:
    """Time both ways side by side."""
    report = onnx_fold.bench(
        variant.plain,
        variant.other,
        provider=provider,
        prefill=TOKENS,
        repeats=repeats,
        tokens=repeats,
        cuda_graph=cuda_graph,
    )
    phases = {phase.name: asdict(phase) for phase in report.phases}
    return {
        "name": variant.name,
        "width": variant.width,
        "expected": variant.expected,
        **phases,
    }


def fitted(results: list[dict[str, Any]], itemsize: int) -> Target | None:
    """The constants with which the times of ``results`` are predicted best.

    What is gained is the time of the weights saved, less that of what is added: in decode ``t = a
    bytes - b operators``, in prefill ``t = a multiplications - b operators - c copied - g
    gathered``. Least squares, no factor negative, each equation over the time of the plain layer.
    None where the saving is not seen.
    """
    decode: list[tuple[list[float], float]] = []
    prefill: list[tuple[list[float], float]] = []
    for row in results:
        d = row["width"]
        if (work := added(row["name"], d)) is None:
            continue
        moved = [-TOKENS * work.copied, -TOKENS * work.gathered]
        for phase, factors, equations in (
            ("decode", [d * d * itemsize, -work.nodes], decode),
            ("prefill", [TOKENS * d * d, -work.nodes, *moved], prefill),
        ):
            plain, other = (row[phase][each]["median_ms"] for each in ("original", "folded"))
            equations.append(([each / plain for each in factors], (plain - other) / plain))
    byte, node = _solved(decode)
    mac, _, copied, gathered = _solved(prefill)
    if min(byte, mac) == 0.0:
        return None
    return Target(round(node / byte), round(copied / mac), round(gathered / mac))


def _solved(equations: list[tuple[list[float], float]]) -> np.ndarray:
    matrix = np.array([factors for factors, _ in equations])
    sizes = np.abs(matrix).max(axis=0)
    return nnls(matrix / sizes, np.array([right for _, right in equations]))[0] / sizes


def render(data: dict[str, Any]) -> str:
    """The page, made of the JSON."""
    provider = data["provider"]
    head = HEAD.format(
        provider=provider,
        option=" --cuda-graph" if data.get("cuda_graph") else "",
        tokens=TOKENS,
        dtype=DTYPES[provider].name,
        machine=data["machine"],
        used=TARGETS[provider],
        fitted=fitted(data["results"], DTYPES[provider].itemsize),
    )
    lines = [
        head,
        "| layer | d | prefill | decode | expected slower |\n|---|---|---|---|---|\n",
    ]
    for row in data["results"]:
        cells = [
            f"{phase['speedup']:.2f} [{phase['low']:.2f}, {phase['high']:.2f}]"
            for phase in (row["prefill"], row["decode"])
        ]
        expected = "" if row["expected"] is None else row["expected"] or "no"
        lines.append(f"| {row['name']} | {row['width']} | {' | '.join(cells)} | {expected} |\n")
    return "".join(lines)


def machine(provider: str) -> str:
    """What ran the layers, as people say it."""
    found = environment(provider)
    return (found["gpu"] or {}).get("name") or f"{found['machine']['threads']} CPU cores"


def main() -> None:
    """Measure, and write what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cuda-graph", action="store_true", help="time captured graphs")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--repeats", type=int, default=200, help="pairs, a fifth for d >= 2048")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    parser.add_argument("--output", type=Path, help="[docs/operators-PROVIDER(-graph).json]")
    arguments = parser.parse_args()
    provider = arguments.provider
    docs = Path(__file__).parents[1] / "docs"
    graph = "-graph" if arguments.cuda_graph else ""
    output = arguments.output or docs / f"operators-{provider}{graph}.json"
    if arguments.render:
        data = json.loads(output.read_text(encoding="utf-8"))
        output.with_suffix(".md").write_text(render(data), encoding="utf-8")
        return
    results = []
    for width in arguments.widths:
        repeats = arguments.repeats if width < 2048 else max(1, arguments.repeats // 5)
        for variant in (*interpolated(provider, width), *packed(provider, width)):
            results.append(measure(variant, provider, repeats, arguments.cuda_graph))
            print(render_row(results[-1]), flush=True)
    names = list(dict.fromkeys(row["name"] for row in results))
    results.sort(key=lambda row: names.index(row["name"]))
    data = {
        "provider": provider,
        "cuda_graph": arguments.cuda_graph,
        "machine": machine(provider),
        "results": results,
    }
    output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(render(data), encoding="utf-8")


def render_row(row: dict[str, Any]) -> str:
    """A line for the terminal."""
    return (
        f"{row['name']:16} d = {row['width']:4}  prefill {row['prefill']['speedup']:.3f}"
        f"  decode {row['decode']['speedup']:.3f}"
    )


if __name__ == "__main__":
    main()

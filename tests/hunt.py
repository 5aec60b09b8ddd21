"""Fold random graphs full of traps, and say which went wrong.

    python tests/hunt.py --seed 0 --graphs 20000 --failures /tmp/failures

Every graph is folded by default and with each strategy forced, without verification, and compared
with the original in ONNX Runtime, unoptimised, at several sizes of each free dim.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from disguise import disguise
from onnx import numpy_helper
from traps import FREE, OPSETS, WIDTH, Graph, Value, finished, reads
from traps_inside import bias, heads, inside, nonlinear
from traps_layers import layer, matmul

import onnx_fold
from onnx_fold.pipeline import FoldResult

FORCED = [
    {"only": [name], "tolerance": float("inf")} for name in ("absorb", "interpolate", "select")
]
OPTIONS = [{}, *FORCED]
SIZES = [(2, 3, 4, 5), (3, 2, 3, 2), (1, 1, 2, 3), (2, 3, 1, 1), (1, 1, 1, 1)]
"""Sizes of the free dims B, S, B2, S2."""
SECONDS = 30
"""What takes longer hangs, in seconds of the processor."""
LIMITS = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 1e-4}


def draw(seed: int) -> onnx.ModelProto | None:
    """The model of one seed; None if that makes no valid model."""
    rng = np.random.default_rng(seed)
    dtype = np.float64 if rng.random() < 0.6 else np.float32
    g = Graph(rng, dtype, int(rng.choice(OPSETS)))
    width = g.choose(WIDTH, WIDTH, 8)
    for name, dims in (("x", ("B", "S", width)), ("x2", ("B2", "S2", WIDTH))):
        g.values.append(g.input(name, dims))
    g.values.append(g.input("x3", g.choose(("B", WIDTH), (2, 3, WIDTH), (2, WIDTH), ("S", WIDTH))))
    g.rng.shuffle(g.values)
    for _ in range(g.choose(1, 2, 2, 3)):
        _stream(g)
    disguise(g)
    model = finished(g, _ends(g))
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception:
        return None
    return model


def _stream(g: Graph) -> None:
    """A writer, what lies behind it, and readers."""
    stream = _layer(g, g.value())
    if stream is None:
        return
    g.values.append(stream)
    for _ in range(g.choose(0, 1, 1, 1, 2, 2, 3)):
        after = inside(g, stream if g.chance(0.9) else g.value())
        if after is not None:
            g.values.append(after)
            stream = after
    if g.chance(0.2):
        stream = _chain(g, stream)
        g.values.append(stream)
    for _ in range(g.choose(1, 1, 2)):
        read = (heads(g, stream) if g.chance(0.15) else None) or _layer(g, stream)
        if read is not None:
            if g.chance(0.2):
                read = inside(g, read) or read
            g.values.append(nonlinear(g, read) if g.chance(0.7) else read)


def _chain(g: Graph, v: Value) -> Value:
    """Residual blocks with a gain behind each sum, as long as their layers fit."""
    for _ in range(g.choose(1, 2, 3)):
        hidden = matmul(g, v)
        if hidden is None or not isinstance(v.width, int) or hidden.dims[:-1] != v.dims[:-1]:
            break
        weight = g.weight(hidden.width, v.width)
        back = g.add("MatMul", [nonlinear(g, hidden).name, weight], v.dims)
        total = g.add("Add", [back.name, v.name] if g.chance() else [v.name, back.name], v.dims)
        factors = g.rng.choice([1.0, -1.0, 2.0, 0.5, 3.0, 0.0], (v.width,), p=[*[0.196] * 5, 0.02])
        v = g.add("Mul", [total.name, g.constant(factors.astype(g.dtype))], v.dims)
        v = (bias(g, v) if g.chance() else None) or v
    return v


def _layer(g: Graph, v: Value) -> Value | None:
    """A layer that reads ``v``: a plain one, or the first of a few that fits."""
    tries = (matmul(g, v) if g.chance(0.3) else layer(g, v) for _ in range(4))
    return next((made for made in tries if made is not None), None)


def _ends(g: Graph) -> list[Value]:
    """What nothing reads, most of it behind one more layer; now and then another value."""
    made = {name for node in g.nodes for name in node.output}
    read = {name for node in g.nodes for name in node.input}
    ends = []
    for value in [v for v in g.values if v.name in made]:
        if value.name in read:
            if g.chance(0.02):
                ends.append(value)
            continue
        last = _layer(g, value) if g.chance(0.9) else None
        ends.append(nonlinear(g, last or value) if g.chance() else last or value)
    return ends


class Hang(BaseException):
    """A fold took too long; no error, so that nothing on the way takes it for one."""


@dataclass
class Subject:
    """A model, and what it computes at each of the sizes that it can take."""

    model: onnx.ModelProto

    @cached_property
    def expected(self) -> list[tuple[dict[str, np.ndarray], list[np.ndarray]]]:
        return run_all(self.model, [feeds(self.model, sizes) for sizes in SIZES])

    @cached_property
    def nudged(self) -> list[list[np.ndarray]]:
        """What it computes once its weights are rounded up or down."""
        copy, rng = onnx.ModelProto(), np.random.default_rng(0)
        copy.CopyFrom(self.model)
        for tensor in copy.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype.kind == "f" and tensor.name not in {i.name for i in copy.graph.input}:
                unit = np.finfo(array.dtype).eps
                array = array * (1 + unit * rng.choice((-1.0, 1.0), array.shape))
                new = numpy_helper.from_array(array.astype(tensor_type(tensor)), tensor.name)
                tensor.CopyFrom(new)
        return [out for _, out in run_all(copy, [inputs for inputs, _ in self.expected])]


def states_its_ranks(subject: Subject) -> bool:
    """Whether all values have the rank that the model says; one that misstates is not judged."""
    copy = onnx.ModelProto()
    copy.CopyFrom(subject.model)
    copy.graph.output.extend(copy.graph.value_info)
    stated = [len(value.type.tensor_type.shape.dim) for value in copy.graph.output]
    if not copy.graph.value_info:
        results = subject.expected
    else:
        results = run_all(copy, [inputs for inputs, _ in subject.expected])
    return all([r.ndim for r in outputs] == stated for _, outputs in results)


def tensor_type(tensor: onnx.TensorProto) -> np.dtype:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    data = model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def feeds(model: onnx.ModelProto, sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Small integers; indices and flags are 0 and true."""
    rng, named = np.random.default_rng(5), dict(zip(FREE, sizes, strict=True))
    held = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for value in model.graph.input:
        if value.name in held:
            continue
        kind = value.type.tensor_type
        shape = [named.get(d.dim_param, d.dim_value) for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if kind.elem_type == onnx.TensorProto.BOOL:
            found[value.name] = np.ones(shape, bool)
        elif kind.elem_type == onnx.TensorProto.INT64:
            found[value.name] = np.zeros(shape, np.int64)
        else:
            found[value.name] = rng.integers(-3, 4, shape).astype(dtype)
    return found


def run_all(model: onnx.ModelProto, all_inputs: list) -> list:
    """Inputs and outputs, for those inputs that the model takes."""
    created, results = session(model), []
    for inputs in all_inputs:
        try:
            results.append((inputs, created.run(None, inputs)))
        except Exception:  # these sizes do not fit each other
            continue
    return results


def fault(subject: Subject, options: dict) -> tuple[str, FoldResult | None]:
    """What is wrong with the fold of a model, in a word or two; empty if nothing is."""
    signal.signal(signal.SIGVTALRM, _hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        model = ir.from_proto(subject.model)
        result = onnx_fold.fold(model, verify=False, **options)
        folded = ir.to_proto(result.model)
    except Hang:
        return "hang", None
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"crash {type(error).__name__} {Path(place.filename).name}:{place.lineno}", None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if not result.report.folded:
        return "", result
    try:
        onnx.checker.check_model(folded, full_check=True)
        actual = session(folded)
    except Exception as error:
        return f"does not load: {str(error)[:60]}", result
    return moved(subject.model, folded, result) or wrong(subject, actual, result), result


def moved(model: onnx.ModelProto, folded: onnx.ModelProto, result: FoldResult) -> str:
    """The first value that keeps its name and its channels, but not its shape."""
    before, after = inferred(model), inferred(folded)
    changed = {name for stream in result.report.folded for name in stream.changed}
    for name in sorted(before.keys() & after.keys() & computed(model) - changed):
        a, b = before[name], after[name]
        sizes = zip(a, b, strict=False)
        if len(a) != len(b) or any(m and n and m != n for m, n in sizes):
            return f"shape of '{name}' from {a} to {b}"
    return ""


def computed(model: onnx.ModelProto) -> set[str]:
    """The values that come from floating-point inputs: a picked weight is none of them."""
    ints = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
    found = {v.name for v in model.graph.input if v.type.tensor_type.elem_type not in ints}
    for node in model.graph.node:
        if found & set(reads(node)):
            found |= set(node.output)
    return found


def inferred(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The sizes of each value by inference, 0 for what depends on free dims."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.output)}
    return {
        name: [dim.dim_value for dim in kind.shape.dim]
        for name, kind in kinds.items()
        if kind.HasField("shape")
    }


def _hang(*_: object) -> None:
    raise Hang


def wrong(subject: Subject, actual: ort.InferenceSession, result: FoldResult) -> str:
    """Which output differs: in its shape, or by more than rounding explains."""
    condition = max((f.folded.condition or 1.0 for f in result.report.folded), default=1.0)
    for number, (inputs, expected) in enumerate(subject.expected):
        try:
            outputs = actual.run(None, inputs)
        except Exception as error:
            return f"does not run: {str(error)[:60]}"
        for place, (a, r) in enumerate(zip(outputs, expected, strict=True)):
            if a.shape != r.shape:
                return "shape"
            if a.dtype != r.dtype:
                return "type"
            if not np.isfinite(r).all():
                continue
            size = max(np.abs(r).max(initial=0.0), 0.1)  # integers may cancel out
            error = np.abs(a - r).max(initial=0.0) / size
            if not error <= LIMITS[r.dtype]:
                own = np.abs(subject.nudged[number][place] - r).max(initial=0.0) / size
                if not error <= max(LIMITS[r.dtype], min(1e-2, 100 * own * condition)):
                    return "numbers"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--folds", type=int, default=10**9, help="stop after so many folds")
    parser.add_argument("--failures", type=Path, help="where to put the models that went wrong")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    start, every = time.monotonic(), 1000
    gc.freeze()
    gc.set_threshold(50_000)
    for seed in range(arguments.seed, arguments.seed + arguments.graphs):
        if counts["folds"] >= arguments.folds:
            break
        counts["drawn"] += 1
        model = draw(seed)
        if model is None:
            continue
        try:
            subject = Subject(model)
            if not subject.expected or not states_its_ranks(subject):
                continue
        except Exception:
            counts["not run by ONNX Runtime"] += 1
            continue
        counts["graphs"] += 1
        is_open = False
        for options in OPTIONS:
            if options and is_open:
                break
            text, result = fault(subject, options)
            is_open = result is not None and not any(s.candidates for s in result.report.streams)
            counts["runs"] += 1
            folded = result.report.folded if result else []
            counts["folds"] += bool(folded)
            counts["streams folded"] += len(folded)
            if text:
                counts[f"FAULT {text}"] += 1
                print(f"seed {seed} {options.get('only', 'default')}: {text}", flush=True)
                if arguments.failures:
                    arguments.failures.mkdir(parents=True, exist_ok=True)
                    onnx.save(model, arguments.failures / f"{seed}.onnx")
        if counts["drawn"] % every == 0:
            print(f"{time.monotonic() - start:.0f} s: {dict(counts)}", flush=True)
    print(f"{time.monotonic() - start:.0f} s")
    for name, count in counts.most_common():
        print(f"{count:8,} {name}")
    return int(any(name.startswith("FAULT") for name in counts))


if __name__ == "__main__":
    sys.exit(main())

"""Small graphs as text, run in ONNX Runtime: what the tests of the engine are made of."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from google.protobuf.message import Message

import onnx_fold
from onnx_fold.algebra.expression import ImpliedTensor
from onnx_fold.engine.batch_norms import ends_of
from onnx_fold.files.load import load
from onnx_fold.graph.constants import FLOATS, constant
from onnx_fold.graph.edit import Editor
from onnx_fold.graph.inline import inline
from onnx_fold.graph.shapes import Shapes
from onnx_fold.pipeline import FoldResult
from onnx_fold.rewriting.affine import as_affine
from onnx_fold.rewriting.rewrite import Rewrite
from onnx_fold.streams.stream import Stream, find_streams

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 3e-2, "bfloat16": 6e-2}


def graph(text: str, /, opset: int = 18, **weights: np.ndarray) -> ir.Model:
    """``"(float[n, 4] x) => (float[n, 4] y) { ... }"`` as a model; ``weights`` are initializers."""
    domains = f'"": {opset}' + (', "com.microsoft": 1' if "com.microsoft." in text else "")
    model = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{domains}]> g {text}")
    for name, array in weights.items():
        model.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    return ir.from_proto(model)


def model(text: str, opset: int = 18, **weights: np.ndarray) -> ir.Model:
    """``"m (...) => (...) { ... }"`` as a model, unchecked; ``weights`` are initializers."""
    header = f'<ir_version: 10, opset_import: ["": {opset}]> '
    tensors = [ir.tensor(array, name=name) for name, array in weights.items()]
    return ir.from_onnx_text(header + text, initializers=tensors)


def load_script(path: Path) -> ModuleType:
    """A script as a module; its dataclasses look that up by its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def normal(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    """Gaussian weights that keep the size of what they multiply."""
    array = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return (array / np.sqrt(shape[0])).astype(dtype)


def chain(*ops: str, width: int = 4, bias: bool = False, **weights: np.ndarray) -> ir.Model:
    """``x -> MatMul(P) (-> Add(b)) -> ops -> MatMul(M) -> y``: ``ops`` lead from ``p`` to ``m``."""
    weights = {"P": normal(width, width, seed=1), "M": normal(width, 5, seed=2)} | weights
    if bias:
        weights = {"b": normal(width, seed=3)} | weights
    start = "h = MatMul(x, P) p = Add(h, b)" if bias else "p = MatMul(x, P)"
    body = " ".join(ops)
    text = f"(float[batch, seq, {width}] x) => (float[a, b, 5] y) "
    text += f"{{ {start} {body} y = MatMul(m, M) }}"
    return graph(text, **weights)


def proto(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def feeds(model: ir.Model, sizes: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """Seeded inputs; symbolic dimensions are 2, 3, 4, ... in order of appearance."""
    generator = np.random.default_rng(7)
    sizes = dict(sizes or {})
    result = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        dims = value.shape or ()
        shape = [
            d if isinstance(d, int) else sizes.setdefault(d.value, 2 + len(sizes)) for d in dims
        ]
        kind = value.dtype.numpy()
        if value.dtype == ir.DataType.BOOL or np.issubdtype(kind, np.integer):
            result[value.name] = generator.integers(0, 2, shape).astype(kind)
        else:
            result[value.name] = generator.standard_normal(shape).astype(kind)
    return result


def outputs(model: ir.Model | Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Run ``model``, or the one in a file, in ONNX Runtime, unoptimised."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    held = str(model) if isinstance(model, Path) else proto(model)
    session = ort.InferenceSession(held, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def assert_same_function(
    original: ir.Model, folded: ir.Model, sizes: dict[str, int] | None = None
) -> None:
    """Valid, same signature, same numbers, same shapes."""
    onnx.checker.check_model(ir.to_proto(folded), full_check=True)
    inputs = feeds(original, sizes)
    expected, actual = outputs(original, **inputs), outputs(folded, **inputs)
    assert list(expected) == list(actual)
    for name, reference in expected.items():
        assert_close(actual[name], reference, name)


def assert_close(actual: np.ndarray, reference: np.ndarray, name: str = "") -> None:
    """Same type, same shape, and the numbers to what the type holds; integers exactly."""
    assert actual.dtype == reference.dtype, name
    assert actual.shape == reference.shape, name
    limit = TOLERANCE.get(reference.dtype.name)
    if limit is None:
        np.testing.assert_array_equal(actual, reference, err_msg=name)
        return
    a, r = actual.astype(np.float64), reference.astype(np.float64)
    floor = 1e-3  # where branches cancel exactly the reference is zero, the folded one rounds
    assert np.linalg.norm(a - r) <= limit * max(np.linalg.norm(r), floor), name


def fold(model: ir.Model, **options) -> FoldResult:
    """Fold whatever saves weights, without the product's own parity check.

    Each fold does what it announces.
    """
    if "target" not in options:
        options.setdefault("objective", "size")
    with announced_is_done():
        return onnx_fold.fold(model, verify=False, **options)


@contextmanager
def announced_is_done() -> Iterator[None]:
    """Meanwhile, whatever changes a graph comes and goes with what was read off its record."""
    apply = Rewrite.apply

    def checked(rewrite: Rewrite, editor: Editor) -> None:
        announced = rewrite.nodes_change(), rewrite.weights_removed()
        nodes, held = num_operators(editor.graph), num_weights(editor.graph)
        apply(rewrite, editor)
        done = num_operators(editor.graph) - nodes, held - num_weights(editor.graph)
        assert announced == done

    with mock.patch.object(Rewrite, "apply", checked):
        yield


def num_operators(graph: ir.Graph) -> int:
    """Operators that run, also where a body of control flow holds them: no makers of constants."""
    made = (map(constant, node.outputs) for node in graph.all_nodes())
    return sum(any(held is None for held in each) for each in made)


def num_weights(graph: ir.Graph) -> int:
    """Elements of all constants; a matrix that an operator implied counts for what it stored."""
    values = [value for node in graph.all_nodes() for value in node.outputs]
    values += [
        value for each in (graph, *graph.subgraphs()) for value in each.initializers.values()
    ]
    held = [each for value in values if (each := constant(value)) and each.leaf is value]
    tensors = [each.tensor for each in held if each.dtype in FLOATS]
    return sum(t.stored_size if isinstance(t, ImpliedTensor) else t.size for t in tensors)


def folded(model: ir.Model, removed: int | None = None, **options) -> FoldResult:
    """Fold ``model``, which must work: same function, ``removed`` weights less."""
    before = proto(model)
    result = fold(model, **options)
    assert result.report.folded, [stream.reasons for stream in result.report.streams]
    assert proto(model) == before, "the source was changed"
    assert_same_function(model, result.model)
    assert weights(model) - weights(result.model) == result.report.saving.weights
    assert_announced(model, result)
    if removed is not None:
        assert result.report.saving.weights == removed
    return result


def assert_announced(model: ir.Model, result: FoldResult) -> None:
    """What the folds of a report announce is, in all, what became of ``model``, functions inlined.

    Not where gains, norms, centring or dead skips are written as products for that time: what
    computed a mean or a skip that is not read any more goes afterwards, and no fold announces it;
    and a gain that two of them share counts for both.
    """
    source = inline(model)
    shapes = Shapes(source)
    if any(as_affine(node, shapes) or ends_of(node, shapes) for node in source.graph):
        return
    folds = [stream.folded for stream in result.report.folded]
    nodes = num_operators(result.model.graph) - num_operators(source.graph)
    assert sum(fold.nodes_added for fold in folds) == nodes
    removed = weights(source) - weights(result.model)
    assert sum(fold.weights_removed for fold in folds) == removed


def refused(model: ir.Model, **options) -> str:
    """Fold ``model``, which must be left as it is; return all the reasons."""
    result = fold(model, **options)
    assert not result.report.folded, [stream.folded.text for stream in result.report.folded]
    assert proto(result.model) == proto(model)
    return "\n".join(reason for stream in result.report.streams for reason in stream.reasons)


def weights(model: ir.Model) -> int:
    """Floating-point elements that the model stores, wherever it does."""
    held = [v.const_value for g in model.graphs() for v in g.initializers.values()]
    held += [
        attribute.as_tensor()
        for body in (model.graph, *model.functions.values())
        for node in body.all_nodes()
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref()
    ]
    held += [
        ir.tensor(np.asarray(attribute.value, np.float32))
        for body in (model.graph, *model.functions.values())
        for node in body.all_nodes()
        for attribute in node.attributes.values()
        if attribute.name.startswith("value_float")
    ]
    return sum(tensor.size for tensor in held if tensor.dtype.is_floating_point())


def stream_of(model: ir.Model, name: str) -> Stream:
    """The first stream that carries the value called ``name``."""
    return next(s for s in find_streams(model) if any(v.name == name for v in s.values))


def square(width: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    """A well-conditioned basis: near a rotation."""
    rotation = np.linalg.qr(normal(width, width, seed=seed, dtype=np.float64))[0]
    return (rotation + 0.1 * normal(width, width, seed=seed + 100)).astype(dtype)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def externalise(model: ir.Model, path: str | Path, location: str = "w.bin") -> None:
    """Save ``model`` with every tensor in a data file, however small, in attributes too."""
    proto = ir.to_proto(model)
    data = bytearray()
    for tensor in _tensors(proto):
        raw = ir.from_proto(tensor).tobytes()
        place = {"location": location, "offset": str(len(data)), "length": str(len(raw))}
        kept = tensor.name, tensor.data_type, list(tensor.dims)
        tensor.Clear()
        tensor.name, tensor.data_type, dims = kept
        tensor.dims.extend(dims)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        data += raw
    (Path(path).parent / location).write_bytes(data)
    Path(path).write_bytes(proto.SerializeToString())


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """All tensors in a protobuf message, at any depth."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if isinstance(value, Iterable) else (value,):
                yield from ([part] if isinstance(part, onnx.TensorProto) else _tensors(part))


def assert_whole(path: str | Path, *owned: str) -> None:
    """Assert that all tensors of the model in ``path`` are in it or in the files ``owned``."""
    names = {
        entry.value
        for tensor in _tensors(onnx.load(path, load_external_data=False))
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert names <= set(owned), names
    load(path)  # and they are in range

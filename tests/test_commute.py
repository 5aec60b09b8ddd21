"""Every operator that may lie inside a stream: P merges into M through it, or nothing folds."""

import re

import numpy as np
import pytest
from helpers import (
    assert_same_function,
    chain,
    fold,
    folded,
    graph,
    normal,
    operators,
    refused,
    stream_of,
)

from onnx_fold.graph.channels import OPERATORS, Group
from onnx_fold.graph.shapes import Shapes
from onnx_fold.streams.heads import HeadLayout, head_layout


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


TWO, ZERO = {"two": number(2.0)}, {"zero": number(0.0)}
GATE = "g = ReduceMean<keepdims = 1>(x, last)"  # one number for each position
LAST = {"last": ints(-1)}

FIRST = "t = Transpose<perm = [0, 2, 1]>(p)"
LAST_AGAIN = "m = Transpose<perm = [0, 2, 1]>(a)"
COMMUTES = [  # x: [batch, seq, 4] -> MatMul(P) -> p -> ... -> m -> MatMul(M)
    ("CastLike", "m = CastLike(p, x)", {}),
    ("GatherND", "m = GatherND(p, i)", {"i": np.array([[1], [0]])}),
    ("Identity", "m = Identity(p)", {}),
    ("Neg", "m = Neg(p)", {}),
    ("Cast", "c = Cast<to = 11>(p) m = Cast<to = 1>(c)", {}),
    ("Dropout", "m = Dropout(p)", {}),
    ("Dropout", "m = Dropout(p, half, off)", {"half": number(0.5), "off": np.array(False)}),
    ("Add", "n = Mul(p, two) m = Add(p, n)", TWO),
    ("Add", "s = ReduceSum(p, i) m = Add(s, p)", {"i": ints(1)}),
    ("Sub", "n = Mul(p, two) m = Sub(n, p)", TWO),
    ("Sum", "n = Neg(p) m = Sum(p, p, n)", {}),
    ("Mul", "m = Mul(p, two)", TWO),
    ("Mul", "m = Mul(two, p)", TWO),
    ("Mul", f"{GATE} m = Mul(g, p)", LAST),
    ("Mul", "m = Mul(p, c)", {"c": normal(3, 1)}),
    ("Div", "m = Div(p, two)", TWO),
    ("Div", f"{GATE} m = Div(p, g)", LAST),
    ("Where", f"{GATE} c = Less(g, zero) n = Neg(p) m = Where(c, p, n)", LAST | ZERO),
    ("Transpose", "m = Transpose<perm = [1, 0, 2]>(p)", {}),
    ("Transpose", "t = Transpose(p) m = Transpose(t)", {}),
    ("Reshape", "m = Reshape(p, s)", {"s": ints(-1, 1, 4)}),
    ("Reshape", "r = Reshape(p, s) m = Reshape(r, t)", {"s": ints(-1, 4), "t": ints(2, -1, 4)}),
    ("Reshape", "m = Reshape(p, s)", {"s": ints(0, 0, -1)}),
    ("Reshape", "t = Transpose<perm = [0, 2, 1]>(p) r = Reshape(t, s)"
     " u = Transpose<perm = [0, 2, 3, 1]>(r)"
     " m = Squeeze(u, i)", {"s": ints(0, 4, -1, 1), "i": ints(2)}),
    ("Flatten", "f = Flatten<axis = 2>(p) m = Unsqueeze(f, i)", {"i": ints(0)}),
    ("Squeeze", "u = Unsqueeze(p, i) m = Squeeze(u, i)", {"i": ints(1)}),
    ("Unsqueeze", "u = Unsqueeze(p, i) m = ReduceSum<keepdims = 0>(u, i)", {"i": ints(0)}),
    ("Expand", "u = Unsqueeze(p, i) e = Expand(u, s) m = ReduceSum<keepdims = 0>(e, i)",
     {"i": ints(0), "s": ints(3, 1, 1, 4)}),
    ("Expand", "u = Unsqueeze(p, i) e = Expand(u, s) m = ReduceSum<keepdims = 0>(e, i)",
     {"i": ints(0), "s": ints(3, 1, 1, 1)}),
    ("Tile", "m = Tile(p, r)", {"r": ints(1, 2, 1)}),
    ("Slice", "m = Slice(p, i, j, j)", {"i": ints(0), "j": ints(1)}),
    ("Split", "a, c = Split<axis = 0, num_outputs = 2>(p) m = Add(a, c)", {}),
    ("Gather", "m = Gather<axis = 1>(p, i)", {"i": ints(1, 0)}),
    ("Gather", "a = Gather<axis = 1>(p, i) m = Unsqueeze(a, j)", {"i": np.array(1), "j": ints(1)}),
    ("Gather", "a = Gather<axis = 0>(p, i) m = Gather<axis = 0>(a, z)",
     {"i": np.array([[0, 1], [1, 0]]), "z": np.array(1)}),
    ("Concat", "n = Neg(p) m = Concat<axis = 1>(p, n)", {}),
    ("Pad", "m = Pad(p, s)", {"s": ints(0, 1, 0, 0, 0, 0)}),
    ("Pad", "m = Pad(p, s, zero, i)", {"s": ints(0, 1, 2, 0), "i": ints(1, 0)} | ZERO),
    ("ReduceSum", "m = ReduceSum(p, i)", {"i": ints(1)}),
    ("ReduceSum", "r = ReduceSum<keepdims = 0>(p, i) m = Unsqueeze(r, i)", {"i": ints(0)}),
    ("ReduceMean", "m = ReduceMean(p, i)", {"i": ints(0, 1)}),
    ("AveragePool", f"{FIRST} a = AveragePool<kernel_shape = [2], pads = [1, 0]>(t)"
     f" {LAST_AGAIN}", {}),
    ("GlobalAveragePool", f"{FIRST} a = GlobalAveragePool(t) {LAST_AGAIN}", {}),
    ("Resize", f"{FIRST} a = Resize(t, , by) {LAST_AGAIN}", {"by": np.float32([1, 1, 2])}),
]  # fmt: skip

LOOKS = [  # the same, but the operator looks at the channels; what the reason must say
    ("Relu", "m = Relu(p)", {}, "read by Relu"),
    ("MatMul", "t = Transpose<perm = [0, 2, 1]>(p) m = MatMul(p, t)", {"M": normal(3, 5)},
     "MatMul"),
    ("LayerNormalization", "m = LayerNormalization(p, one)", {"one": normal(4)}, "LayerNorm"),
    ("Cast", "c = Cast<to = 7>(p) m = Cast<to = 1>(c)", {}, "Cast"),
    ("Dropout", "m = Dropout(p, half, on)", {"half": number(0.5), "on": np.array(True)}, "Dropout"),
    ("Dropout", "d, k = Dropout(p) c = Cast<to = 1>(k) m = Mul(d, c)", {}, "Dropout"),
    ("Add", f"{GATE} m = Add(p, g)", LAST, "Add, which adds 'g', which has no channel axis"),
    ("Add", "m = Add(p, x)", {}, "'x' is a graph input"),
    ("Sub", f"{GATE} m = Sub(g, p)", LAST, "Sub, which adds 'g'"),
    ("Sum", f"{GATE} m = Sum(p, p, g)", LAST, "Sum, which adds 'g'"),
    ("Mul", "s = Mul(p, c) m = Relu(s)", {"c": normal(4)}, "Mul, which has a gain of its own"),
    ("Mul", "m = Mul(p, p)", {}, "Mul"),
    ("Mul", "m = Mul(x, p)", {}, "Mul"),
    ("Div", "m = Div(two, p)", TWO, "Div"),
    ("Div", "s = Div(p, c) m = Relu(s)", {"c": normal(4)}, "Div, which has a gain of its own"),
    ("Where", "c = Less(x, zero) n = Neg(p) m = Where(c, p, n)", ZERO, "Where"),
    ("Where", f"{GATE} c = Less(g, zero) m = Where(c, p, g)", LAST | ZERO, "Where"),
    ("Transpose", "m = Transpose<perm = [0, 2, 1]>(p)", {"M": normal(3, 5)}, "another axis"),
    ("Reshape", "r = Reshape(p, s) m = Reshape(r, t)", {"s": ints(0, 0, 2, 2), "t": ints(0, 0, 4)},
     "Reshape, which does not keep the channel axis whole"),
    ("Reshape", "t = Transpose<perm = [0, 2, 1]>(p) m = Reshape(t, s)", {"s": ints(0, -1, 4)},
     "Reshape, which does not keep"),
    ("AveragePool", "m = AveragePool<kernel_shape = [1]>(p)", {}, "AveragePool"),
    ("GlobalAveragePool", "m = GlobalAveragePool(p)", {"M": normal(1, 5)}, "GlobalAveragePool"),
    ("Resize", "m = Resize(p, , by)", {"by": np.float32([1, 1, 2]), "M": normal(8, 5)}, "Resize"),
    ("Flatten", "f = Flatten(p) m = Reshape(f, s)", {"s": ints(0, -1, 4)},
     "Flatten, which does not"),
    ("Expand", "m = Expand(p, s)", {"P": normal(4, 1), "s": ints(1, 1, 4)}, "Expand"),
    ("Tile", "m = Tile(p, r)", {"r": ints(1, 1, 2), "M": normal(8, 5)}, "Tile"),
    ("Slice", "m = Slice(p, i, j, j)", {"i": ints(0), "j": ints(2), "M": normal(2, 5)},
     "Slice, which takes a part of the channels"),
    ("Split", "m, r = Split<axis = 2, num_outputs = 2>(p)", {"M": normal(2, 5)},
     "Split, which splits"),
    ("Gather", "m = Gather<axis = 2>(p, i)", {"i": ints(3, 1, 0, 2)},
     "Gather, which gathers channels"),
    ("Concat", "m = Concat<axis = -1>(p, p)", {"M": normal(8, 5)}, "Concat, which joins channels"),
    ("GatherND", "m = GatherND(p, i)", {"i": np.zeros((1, 1, 4, 3), np.int64)},
     "GatherND, which gathers channels"),
    ("CastLike", "k = CastLike(p, i) m = CastLike(k, p)", {"i": ints(1)}, "CastLike"),
    ("Pad", "m = Pad(p, s)", {"s": ints(0, 0, 0, 0, 0, 1), "M": normal(5, 5)},
     "Pad, which pads the"),
    ("Pad", "m = Pad(p, s, , i)", {"s": ints(1, 0, 1, 0), "i": ints(2, 1), "M": normal(6, 5)},
     "Pad"),
    ("Pad", "m = Pad(p, s, two)", {"s": ints(0, 1, 0, 0, 0, 0)} | TWO, "Pad"),
    ("Pad", "m = Pad<mode = \"edge\">(p, s)", {"s": ints(0, 1, 0, 0, 0, 0)}, "Pad"),
    ("ReduceSum", "m = ReduceSum(p, i)", {"i": ints(2), "M": normal(1, 5)},
     "ReduceSum, which reduces"),
    ("ReduceSum", "r = ReduceSum<keepdims = 0>(p) m = Reshape(r, s)",
     {"s": ints(1, 1, 1), "M": normal(1, 5)}, "ReduceSum"),
    ("ReduceMean", "r = ReduceMean<keepdims = 0>(p, i) m = Unsqueeze(r, i)",
     {"i": ints(2), "M": normal(1, 5)}, "ReduceMean, which reduces over the channels"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "body", "extra"), COMMUTES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_merge_goes_through(op, body, extra):
    model = chain(body, **extra)
    result = folded(model, removed=16, only=["merge"])
    assert list(result.model.graph.initializers).count("P") == 0
    kept = operators(model)
    kept.remove("MatMul")
    assert operators(result.model) == kept


@pytest.mark.parametrize(
    ("op", "body", "extra", "reason"), LOOKS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_an_operator_that_looks_at_the_channels_opens_the_stream(op, body, extra, reason):
    model = chain(body, **extra)
    refused(model, skip=["branches", "rotate", "split"])
    openings = "\n".join(map(str, stream_of(model, "p").openings))
    assert reason in re.sub(r" -> \w+", "", openings)


def test_the_tables_cover_every_rule():
    blind = {"Identity", "Neg", "Squeeze", "Unsqueeze"}  # cannot look at the channels
    general = {op for op, each in OPERATORS.items() if each.group == Group.GENERAL}
    assert {op for op, *_ in COMMUTES} == general
    assert {op for op, *_ in LOOKS} >= general - blind


def test_an_operator_of_another_domain_has_no_rule():
    model = chain("m = Identity(p)")
    next(node for node in model.graph if node.op_type == "Identity").domain = "custom"
    model.opset_imports["custom"] = 1
    refused(model)
    assert "read by Identity" in str(stream_of(model, "p").openings[0])


@pytest.mark.parametrize(
    "body", ["m = Mul(p, p)", "m = Mul(p, x)", "t = Transpose<perm = [0, 2, 1]>(p) m = Mul(t, p)"]
)
def test_one_channel_wide_products_are_not_linear(body):
    refused(chain(body, width=1, P=np.full((1, 1), 2.0, np.float32)))


def test_a_constant_that_widens_the_stream():
    refused(chain("m = Add(p, c)", P=normal(4, 1), c=normal(4)))


# --- One table ------------------------------------------------------------------------------------


def test_what_lets_a_basis_through_lets_a_permutation_through():
    for name, each in OPERATORS.items():
        assert each.group < Group.GENERAL or each.ports is not None, name
        assert each.group < Group.PERMUTATION or each.ports or each.reordered, name


@pytest.mark.parametrize("operator", ["CastLike(a, x)", "Cast<to = 1>(a)", "Identity(a)"])
def test_a_bias_is_carried_past_what_leaves_vectors_as_they_are(operator):
    source = chain(f"a = Identity(p) m = {operator}", bias=True)
    result = fold(source, only=["merge"])
    assert result.report.folded
    assert_same_function(source, result.model)


def test_a_bias_is_carried_past_a_gather_of_whole_vectors():
    source = chain(
        "m = GatherND<batch_dims = 0>(p, rows)", bias=True, rows=np.array([[[0, 0], [0, 1]]])
    )
    result = fold(source, only=["merge"])
    assert result.report.folded
    assert_same_function(source, result.model)


@pytest.mark.parametrize("operator", ["CastLike(s, x)", "Cast<to = 1>(s)", "Identity(s)"])
def test_heads_are_found_behind_what_keeps_the_channels(operator):
    source = graph(
        f"(float[b, n, 8] x) => (float[b, n, 4, 2] q) {{ s = MatMul(x, Q) t = {operator}"
        " q = Reshape(t, cut) }",
        Q=normal(8, 8),
        cut=np.array([0, 0, 4, 2]),
    )
    value = next(node.outputs[0] for node in source.graph if node.op_type == "MatMul")
    assert head_layout(value, 8, Shapes(source)) == HeadLayout(4, 2)

"""Fused projections: whatever the layout, Q (K, V) goes and the others come out as they were."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import folded, graph, normal, operators, refused, square

from onnx_fold.report.attention import find_attention
from onnx_fold.streams.stream import find_streams

D, H, S = 12, 4, 3  # width, heads, head size
Q, K, V = (square(D, seed=seed) for seed in (1, 2, 3))


def interleaved(*order: np.ndarray) -> np.ndarray:
    """Columns as ``[heads, parts, head size]``."""
    return np.stack([w.reshape(-1, H, S) for w in order], axis=2).reshape(-1, len(order) * D)


HEADS_FIRST = "q4 = Transpose<perm = [0, 2, 1, 3]>({}) k4 = Transpose<perm = [0, 2, 1, 3]>({})"
HEADS_FIRST += " v4 = Transpose<perm = [0, 2, 1, 3]>({})"
NEOX = "h = MatMul(x, W) g = Add(h, c) r = Reshape(g, cut) t = Transpose<perm = [0, 2, 1, 3]>(r)"
CUT = {"cut": np.array([0, 0, H, 3 * S])}
BOUNDS = {name: np.array([i * S]) for i, name in enumerate(("b0", "b1", "b2", "b3"))}
FIVE = {"five": np.array([0, 0, 3, H, S])}
SIZES = {"cut3": np.array([S, S, S])}

# name → (layout of the columns, operators from x to q4, k4, v4 [batch, heads, n, head size], held)
LAYOUTS = {
    "neox": (interleaved, f"{NEOX} q4, k4, v4 = Split<axis = -1, num_outputs = 3>(t)", CUT),
    "neox, sizes": (interleaved, f"{NEOX} q4, k4, v4 = Split<axis = 3>(t, cut3)", CUT | SIZES),
    "neox, slices": (
        interleaved,
        f"{NEOX} q4 = Slice(t, b0, b1, b3) k4 = Slice(t, b1, b2, b3) v4 = Slice(t, b2, e, b3)",
        CUT | BOUNDS | {"b3": np.array([3]), "e": np.array([2**31 - 1])},
    ),
    "neox, computed bounds": (
        interleaved,
        f"""{NEOX} w = Shape<start = -1>(r) a = Div(w, three) b = Mul(a, two)
            q4 = Slice(t, b0, a, b3) k4 = Slice(t, a, b, b3) v4 = Slice(t, b, w, b3)""",
        CUT | BOUNDS | {"b3": np.array([3]), "two": np.array([2]), "three": np.array([3])},
    ),
    "timm": (
        lambda *w: np.hstack(w),
        """h = MatMul(x, W) g = Add(h, c) r = Reshape(g, five)
           t = Transpose<perm = [2, 0, 3, 1, 4]>(r)
           q4 = Gather<axis = 0>(t, i0) k4 = Gather<axis = 0>(t, i1) v4 = Gather<axis = 0>(t, i2)
        """,
        FIVE | {f"i{i}": np.array(i) for i in range(3)},
    ),
    "timm, unbind": (
        lambda *w: np.hstack(w),
        """h = MatMul(x, W) g = Add(h, c) r = Reshape(g, five)
           t = Transpose<perm = [2, 0, 3, 1, 4]>(r) q5, k5, v5 = Split<axis = 0, num_outputs = 3>(t)
           q4 = Squeeze(q5, zero) k4 = Squeeze(k5, zero) v4 = Squeeze(v5, zero)""",
        FIVE | {"zero": np.array([0])},
    ),
    "timm, Gemm": (
        lambda *w: np.hstack(w),
        """rows = Reshape(x, flat2) g = Gemm<beta = 2.0>(rows, W, c) s = Shape<end = 2>(x)
           target = Concat<axis = 0>(s, heads5) r = Reshape(g, target)
           t = Transpose<perm = [2, 0, 3, 1, 4]>(r)
           q4 = Gather<axis = 0>(t, i0) k4 = Gather<axis = 0>(t, i1) v4 = Gather<axis = 0>(t, i2)
        """,
        {"flat2": np.array([-1, D]), "heads5": np.array([3, H, S])}
        | {f"i{i}": np.array(i) for i in range(3)},
    ),
    "nn.MultiheadAttention": (
        lambda *w: np.hstack(w),
        f"""h = MatMul(x, W) g = Add(h, c) r = Reshape(g, three) u = Unsqueeze(r, zero)
            p = Transpose<perm = [3, 1, 2, 0, 4]>(u) t = Squeeze(p, last)
            q = Gather<axis = 0>(t, i0) k = Gather<axis = 0>(t, i1) v = Gather<axis = 0>(t, i2)
            q3 = Reshape(q, s) k3 = Reshape(k, s) v3 = Reshape(v, s)
            {HEADS_FIRST.format("q3", "k3", "v3")}""",
        {"three": np.array([0, 0, 3, D]), "zero": np.array([0]), "last": np.array([3])}
        | {"s": np.array([0, 0, H, S])}
        | {f"i{i}": np.array(i) for i in range(3)},
    ),
    "SplitToSequence, one size": (
        lambda *w: np.hstack(w),
        f"""h = MatMul(x, W) g = Add(h, c) l = SplitToSequence<axis = -1>(g, size)
            q = SequenceAt(l, i0) k = SequenceAt(l, i1) v = SequenceAt(l, i2)
            q3 = Reshape(q, s) k3 = Reshape(k, s) v3 = Reshape(v, s)
            {HEADS_FIRST.format("q3", "k3", "v3")}""",
        {"size": np.array(D), "s": np.array([0, 0, H, S])}
        | {f"i{i}": np.array(i) for i in range(3)},
    ),
    "slices of the columns": (
        lambda *w: np.hstack(w),
        f"""h = MatMul(x, W) g = Add(c, h) w = Shape<start = -1>(x) w2 = Add(w, w) w3 = Add(w2, w)
            q = Slice(g, zero, w, last) k = Slice(g, w, w2, last) v = Slice(g, w2, w3, last)
            q3 = Reshape(q, s) k3 = Reshape(k, s) v3 = Reshape(v, s)
            {HEADS_FIRST.format("q3", "k3", "v3")}""",
        {"zero": np.array([0]), "last": np.array([2]), "s": np.array([0, 0, H, S])},
    ),
    "SplitToSequence": (
        lambda *w: np.hstack(w),
        f"""h = MatMul(x, W) g = Add(h, c) l = SplitToSequence<axis = 2>(g, sizes)
            q = SequenceAt(l, i0) k = SequenceAt(l, i1) v = SequenceAt(l, i2)
            q3 = Reshape(q, s) k3 = Reshape(k, s) v3 = Reshape(v, s)
            {HEADS_FIRST.format("q3", "k3", "v3")}""",
        {"sizes": np.array([D, D, D]), "s": np.array([0, 0, H, S])}
        | {f"i{i}": np.array(i) for i in range(3)},
    ),
}  # fmt: skip
CORE = """
    kt = Transpose<perm = [0, 1, 3, 2]>(k4) scores = MatMul(q4, kt)
    probs = Softmax<axis = -1>(scores) context = MatMul(probs, v4)
    c4 = Transpose<perm = [0, 2, 1, 3]>(context) y = Reshape(c4, flat)
"""


def model(body: str, weight: np.ndarray, more: str = "", **held: np.ndarray) -> ir.Model:
    text = f"(float[b, n, 20] x0) => (float[b, n, {D}] y{more})"
    text += f" {{ x = MatMul(x0, O) {body} {CORE} }}"
    held = {"O": normal(20, D), "W": weight, "c": normal(weight.shape[1], seed=3)} | held
    return graph(text, flat=np.array([0, 0, -1]), **held)


@pytest.mark.parametrize("pivot", ["q", "k", "v"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_part_goes(name, pivot):
    arrange, body, held = LAYOUTS[name]
    source = model(body, arrange(Q, K, V), **held)
    result = folded(source, D * D, only=["absorb"], pivot=pivot)
    assert result.model.graph.initializers["W"].shape == (D, 2 * D)
    assert operators(result.model).count("Split") == 1
    (stream,) = result.report.folded
    assert stream.folded.nodes_added >= len(operators(result.model)) - len(operators(source))
    assert {"x", "g" if name == "timm, Gemm" else "h"} <= stream.changed
    if name == "timm, Gemm":  # the shape that it computed, and that of all parts
        assert operators(result.model).count("Concat") == 2
    (attention,) = find_attention(find_streams(source))
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (H, H, S)


GROUPS = 2
FALCON = {
    # [heads + 2, head size]: the last two are the key and the value
    "mqa": (
        f"""h = MatMul(x, W) r = Reshape(h, cut) q = Slice(r, zero, minus2, axis)
            k = Gather<axis = 2>(r, i0) v = Gather<axis = 2>(r, i1)
            {HEADS_FIRST.format("q", "k", "v")}""",
        {"cut": np.array([0, 0, H + 2, S]), "i0": np.array([-2]), "i1": np.array([-1])},
        1,
    ),
    # [groups, heads of the group + 2, head size]
    "gqa": (
        f"""h = MatMul(x, W) r = Reshape(h, cut) q = Slice(r, zero, minus2, axis)
            k = Gather<axis = 3>(r, i0) v = Gather<axis = 3>(r, i1)
            kb = Expand(k, wide) vb = Expand(v, wide)
            q3 = Reshape(q, s) k3 = Reshape(kb, s) v3 = Reshape(vb, s)
            {HEADS_FIRST.format("q3", "k3", "v3")}""",
        {"cut": np.array([0, 0, GROUPS, H // GROUPS + 2, S]), "axis": np.array([3])}
        | {"i0": np.array([-2]), "i1": np.array([-1]), "s": np.array([0, 0, H, S])}
        | {"wide": np.array([1, 1, GROUPS, H // GROUPS, S])},
        GROUPS,
    ),
}


@pytest.mark.parametrize("name", FALCON)
def test_groups_of_query_heads_with_their_key_and_value(name):
    body, held, groups = FALCON[name]
    k, v = (normal(D, groups * S, seed=seed) for seed in (5, 6))
    parts = [w.reshape(D, groups, -1, S) for w in (Q, k, v)]
    weight = np.concatenate(parts, axis=2).reshape(D, -1)
    held = {"zero": np.array([0]), "minus2": np.array([-2]), "axis": np.array([2])} | held
    result = folded(model(body, weight, **held), D * D, only=["absorb"])
    assert result.model.graph.initializers["W"].shape == (D, 2 * groups * S)
    (stream,) = result.report.folded
    assert stream.folded.text.startswith(f"MatMul -> h{'[0:12]' if groups == 1 else '[q]'} into")


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (f"float[b, n, {3 * D}]", "z = Identity(h)", "no strategy applies"),
        (f"float[b, n, {3 * D}]", "z = Relu(g)", "no strategy applies"),
        ("int64[4]", "z = Shape(r)", "reads the width"),
    ],
)
def test_a_fused_projection_that_something_else_reads(kind, change, reason):
    _, body, held = LAYOUTS["neox"]
    source = model(f"{body} {change}", interleaved(Q, K, V), f", {kind} z", **held)
    assert reason in refused(source, only=["absorb"])


def test_overlapping_parts_are_no_parts():
    held = {
        "zero": np.array([0]),
        "a": np.array([D]),
        "b": np.array([D - 1]),
        "e": np.array([2 * D]),
    }
    text = f"""(float[b, n, 20] x0) => (float[b, n, {D}] p, float[b, n, {D + 1}] q)
        {{ x = MatMul(x0, O) h = MatMul(x, W)
           p = Slice(h, zero, a, two) q = Slice(h, b, e, two) }}"""
    source = graph(text, O=normal(20, D), W=np.hstack([Q, K]), two=np.array([2]), **held)
    assert "no strategy applies" in refused(source, only=["absorb"])

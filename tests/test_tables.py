"""What depends on the rows of a constant alone is computed once for each row."""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir
import pytest
from helpers import fold, folded, graph, normal, operators, outputs, proto, refused

import onnx_fold

D, OUT, N = 8, 6, 3
TABLES = ["tables"]
HELD = {"Q": normal(1, D), "W": normal(D, OUT, seed=1), "b": normal(OUT, seed=2)}
ATTEND = "t = Transpose <perm = [0, 2, 1]> (q) s = MatMul(x, t) y = Softmax(s)"
"""What looks at the channels of ``q``: scores of ``x``."""


def query(body: str, width: int = OUT, kind: str = "float", **held: np.ndarray) -> ir.Model:
    """``body`` makes ``q``, ``[b, n, width]``, of constants and the shape of ``x``."""
    text = f"({kind}[b, t, {width}] x) => ({kind}[b, t, n] y) {{ {body} {ATTEND} }}"
    dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[kind]
    floats = {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in held.items()}
    return graph(text, **floats)


def repeated(k: int) -> str:
    """The integers ``m``: the size of the batch, 1, ``k``."""
    return (
        f"n = Shape <start = 0, end = 1> (x) k = Constant <value_ints = [1, {k}]> ()"
        " m = Concat <axis = 0> (n, k)"
    )


@pytest.mark.parametrize("kind", ["float", "double", "float16"])
def test_a_layer_of_a_query_that_is_repeated_is_another_query(kind):
    """SigLIP's probe: ``d · out`` weights and both vectors go, and ``out`` numbers come."""
    body = f"{repeated(D)} r = Expand(Q3, m) p = MatMul(r, W) q = Add(p, b)"
    held = {"Q3": HELD["Q"].reshape(1, 1, D), "W": HELD["W"], "b": HELD["b"]}
    result = folded(query(body, kind=kind, **held), D * OUT + OUT + D - OUT, only=TABLES)
    assert operators(result.model).count("MatMul") == 1
    assert "Add" not in operators(result.model)


@pytest.mark.parametrize(
    "body",
    [
        f"{repeated(D)} r = Expand(Q, m)",
        f"{repeated(1)} r = Expand(Q, m)",
        "c = Constant <value_ints = [1, 3, 8]> () r = Expand(Q, c)",
        "c = Constant <value_ints = [1, 1, -1]> () r = Reshape(Q, c)",
        "c = Constant <value_ints = [1, 1, 8]> () r = Reshape(Q, c)",
        "a = Constant <value_ints = [0]> () r = Unsqueeze(Q, a)",
        f"u = Transpose <perm = [1, 0]> (Qt) {repeated(D)} r = Expand(u, m)",
        "a = Constant <value_ints = [1]> () u = Unsqueeze(Q, a)"
        " r = Transpose <perm = [1, 0, 2]> (u)",
    ],
)  # fmt: skip
def test_whatever_repeats_and_moves_the_rows(body):
    """A shape that names the channels names those behind the layer."""
    held = {"Qt": HELD["Q"].T.copy()} if "Qt" in body else {"Q": HELD["Q"]}
    source = query(f"{body} q = MatMul(r, W)", W=HELD["W"], **held)
    folded(source, D * OUT + D - OUT, only=TABLES)


def test_a_layer_of_a_constant_is_a_constant():
    text = f"(float[b, t, {OUT}] x) => (float[b, t, {OUT}] y) {{ q = MatMul(Q, W) y = Mul(x, q) }}"
    result = folded(graph(text, Q=HELD["Q"], W=HELD["W"]), D * OUT + D - OUT, only=TABLES)
    assert operators(result.model) == ["Mul"]


def test_constants_of_constants():
    """What is seen through a Transpose is a constant like any other."""
    text = f"""(float[b, t, {OUT}] x) => (float[b, t, {OUT}] y) {{ r = Transpose(Qt) s = Add(r, c)
        q = MatMul(s, W) y = Mul(x, q) }}"""
    fold(graph(text, Qt=HELD["Q"].T.copy(), c=normal(D), W=HELD["W"]), only=TABLES)


def test_gemm_counts_its_factors():
    text = f"""(float[t, {OUT}] x) => (float[t, n] y) {{ s = Constant <value_ints = [5, {D}]> ()
        r = Expand(Q, s) q = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (r, Wt, b)
        t = Transpose(q) y = MatMul(x, t) }}"""
    source = graph(text, Q=HELD["Q"], Wt=normal(OUT, D), b=HELD["b"])
    folded(source, D * OUT + D, only=TABLES)


def test_what_something_else_reads_stays():
    """DETR: the queries are added again in each layer, so they stay beside what they become."""
    body = f"{repeated(1)} r = Tile(Q3, m) q = MatMul(r, W) o = ReduceSum(r) "
    text = f"""(float[b, t, {D}] x) => (float[b, t, n] y, float[a, c, d] o)
        {{ {body} {ATTEND} }}"""
    source = graph(text, Q3=normal(1, N, D), W=normal(D, D, seed=3))
    folded(source, D * D - N * D, only=TABLES)


def test_a_chain_that_only_its_shape_is_read_of_keeps_its_place():
    """As TorchScript reads the size of the batch."""
    body = f"{repeated(1)} r = Tile(Q3, m) q = MatMul(r, W) o = Shape(r) "
    text = f"(float[b, t, {D}] x) => (float[b, t, n] y, int64[3] o) {{ {body} {ATTEND} }}"
    source = graph(text, Q3=normal(1, 2, D), W=normal(D, D, seed=3))
    result = folded(source, D * D, only=TABLES)
    assert operators(result.model).count("Tile") == 1


@pytest.mark.parametrize("zeros", ["Expand(zero, m)", "ConstantOfShape(m)"])
def test_zeros_become_the_bias(zeros):
    """The values of DETR's first decoder layer."""
    body = f"{repeated(D)} r = {zeros} p = MatMul(r, W) q = Add(p, b)"
    held = {"W": normal(D, D), "b": normal(D, seed=2)}
    if "zero," in zeros:
        held["zero"] = np.zeros((), np.float32)
    source = query(body, D, **held)
    folded(source, D * D + held.get("zero", np.zeros(0)).size, only=TABLES)


def test_zeros_that_queries_are_added_to():
    body = f"""{repeated(1)} r = Tile(Q3, m) o = Shape(r) z = ConstantOfShape(o) u = Add(z, r)
        q = MatMul(u, W)"""
    source = query(body, Q3=normal(1, N, D), W=HELD["W"])
    folded(source, D * OUT + N * D - N * OUT, only=TABLES)


BEHIND = {
    "LayerNormalization": "h = LayerNormalization <epsilon = 0.1> (r, g, c)",
    "RMSNorm": """
        a = Constant <value_ints = [2]> () r2 = Mul(r, r) v = ReduceMean <keepdims = 1> (r2, a)
        u = Add(v, two) d = Sqrt(u) f = Div(r, d) h0 = Mul(f, g) h = Sub(h0, c)""",
    "tanh": "u = Add(r, c) e = Tanh(u) h = Mul(e, g)",
    "gate": "u = MatMul(r, G) g1 = Mul(u, g) e = Sigmoid(g1) u1 = Add(u, c) h = Mul(e, u1)",
}


@pytest.mark.parametrize("kind", ["double", "float", "float16"])
@pytest.mark.parametrize("name", BEHIND)
def test_what_looks_at_each_row_by_itself(name, kind):
    """Norms, gains, activations in front of the layer: both go with it."""
    body = f"{repeated(1)} r = Tile(Q3, m) {BEHIND[name]} p = MatMul(h, W) q = Tanh(p)"
    held = {"Q3": 3 * normal(1, N, D), "W": HELD["W"], "g": normal(D), "c": normal(D, seed=3)}
    held |= {"G": normal(D, D)} if "G)" in body else {}
    held |= {"two": np.full((), 2.0)} if "two)" in body else {}
    result = folded(query(body, kind=kind, **held), only=TABLES)
    bare = query(f"{repeated(1)} q = Tile(Q, m)", Q=normal(1, 1, OUT))
    assert sorted(operators(result.model)) == sorted(operators(bare))


def test_the_proof_is_exact_through_norms_and_activations():
    source = query(
        f"{repeated(1)} r = Tile(Q3, m) u = Add(r, c) e = Erf(u) h = Mul(e, g) q = MatMul(h, W)",
        Q3=3 * normal(1, N, D),
        W=HELD["W"],
        g=normal(D),
        c=normal(D, seed=3),
    )
    result = onnx_fold.fold(source, only=TABLES)
    assert result.report.folded
    assert result.report.proof.error < 1e-12
    assert result.report.verification.ok


def test_more_numbers_than_the_weight_has():
    """16 rows of 6 are more than 8 rows of 6."""
    body = f"{repeated(1)} r = Tile(Q3, m) q = MatMul(r, W) o = ReduceSum(r) "
    text = f"(float[b, t, {OUT}] x) => (float[b, t, n] y, float[a, c, d] o) {{ {body} {ATTEND} }}"
    source = graph(text, Q3=normal(1, 16, D), W=HELD["W"])
    assert "weights would grow by 48" in refused(source, only=TABLES)


def test_a_weight_that_another_layer_reads():
    """What stays is no saving; the query goes, which has more numbers than what it becomes."""
    text = f"""(float[b, t, {OUT}] x, float[a, {D}] w) => (float[b, t, n] y, float[a, {OUT}] o)
        {{ {repeated(1)} r = Tile(Q3, m) q = MatMul(r, W) o = MatMul(w, W) {ATTEND} }}"""
    held = {"Q3": normal(1, 9, D), "W": HELD["W"]}
    assert folded(graph(text, **held), only=TABLES).report.saving.weights == 9 * (D - OUT)
    also = text.replace("q = MatMul(r, W)", "p = MatMul(r, W) l = ReduceSum(r) q = Add(p, l)")
    assert "has other readers, and a copy would cost" in refused(graph(also, **held), only=TABLES)


def test_a_constant_that_a_caller_can_override():
    text = f"""(float[b, t, {OUT}] x, float[1, {N}, {D}] Q3) => (float[b, t, n] y)
        {{ {repeated(1)} r = Tile(Q3, m) q = MatMul(r, W) {ATTEND} }}"""
    source = graph(text, Q3=normal(1, N, D), W=HELD["W"])
    refused(source, only=TABLES)


@pytest.mark.parametrize("name", ["W", "Q3", "q"])
def test_what_is_protected(name):
    source = query("q = MatMul(Q3, W)", Q3=HELD["Q"].reshape(1, 1, D), W=HELD["W"])
    assert f"'{name}' is protected" in refused(source, only=TABLES, protect=name)


def test_a_constant_that_is_added_to_what_is_computed():
    """Positions: the layer reads what is computed."""
    text = (
        f"(float[b, {N}, {D}] x) => (float[b, {N}, {OUT}] y) {{ s = Add(x, P) y = MatMul(s, W) }}"
    )
    source = graph(text, P=normal(N, D), W=HELD["W"])
    assert " into " not in refused(source, only=TABLES)


# --- As exporters write it -----------------------------------------------------------------------

torch = pytest.importorskip("torch")


class Pool(torch.nn.Module):
    """The pooling head of SigLIP and of timm: one learned query attends to all of ``x``."""

    def __init__(self, d: int = 16, packed: bool = False) -> None:
        super().__init__()
        self.probe = torch.nn.Parameter(torch.randn(1, 1, d))
        self.attention = torch.nn.MultiheadAttention(d, 2, batch_first=True) if packed else None
        self.q, self.k, self.v = (torch.nn.Linear(d, d) for _ in range(3))
        self.norm, self.fc = torch.nn.LayerNorm(d), torch.nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probe = self.probe.repeat(x.shape[0], 1, 1)
        if self.attention is not None:
            h = self.attention(probe, x, x)[0]
        else:
            q, k, v = self.q(probe), self.k(x), self.v(x)
            h = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return (h + torch.nn.functional.gelu(self.fc(self.norm(h))))[:, 0]


class Decoder(torch.nn.Module):
    """DETR's first decoder layers: queries and zeros through the first, queries added again."""

    def __init__(self, d: int = 16, n: int = 5) -> None:
        super().__init__()
        self.query = torch.nn.Embedding(n, d)
        self.q, self.k, self.v, self.o = (
            torch.nn.ModuleList([torch.nn.Linear(d, d) for _ in range(2)]) for _ in range(4)
        )
        self.norm = torch.nn.ModuleList([torch.nn.LayerNorm(d) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query.weight.unsqueeze(0).repeat(x.shape[0], 1, 1)
        y = torch.zeros_like(query)
        for q, k, v, o, norm in zip(self.q, self.k, self.v, self.o, self.norm, strict=True):
            z = y + query
            y = norm(y + o(torch.softmax(q(z) @ k(z).transpose(1, 2), -1) @ v(y)))
            y = y + x
        return y


def exported(module: torch.nn.Module, x: torch.Tensor, dynamo: bool, path) -> ir.Model:
    """``module`` as ``torch.onnx.export`` writes it, with a batch of any size."""
    module.eval()
    how = {"dynamic_axes": {"x": {0: "b"}}, "opset_version": 17}
    if dynamo:
        how = {"dynamic_shapes": ({0: torch.export.Dim("b", min=2)},), "external_data": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, dynamo=dynamo, input_names=["x"], **how)
    return ir.load(path)


@pytest.mark.parametrize("dynamo", [True, False])
def test_siglip_s_probe_as_exported(dynamo, tmp_path):
    d = 16
    torch.manual_seed(0)
    source = exported(Pool(d), torch.randn(3, 7, d), dynamo, tmp_path / "m.onnx")
    result = folded(source, d * d + d, only=TABLES)
    (stream,) = result.report.folded
    assert stream.folded.text.startswith("q into ")


def test_siglip_s_probe_in_one_weight_with_keys_and_values(tmp_path):
    """Query and the rest are cut from one weight in the graph: what is left of it is the rest."""
    d = 16
    torch.manual_seed(0)
    module = Pool(d, packed=True)
    source = exported(module, torch.randn(3, 7, d), True, tmp_path / "m.onnx")
    result = fold(source, only=TABLES)
    assert result.report.saving.weights == d * d + d
    feed = {"x": normal(2, 7, d)}
    (before,), (after,) = (outputs(m, **feed).values() for m in (source, result.model))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    assert operators(source).count("Split") - operators(result.model).count("Split") == 2


def test_a_split_of_a_constant_that_nothing_changes_stays(tmp_path):
    torch.manual_seed(0)
    module = Pool(16, packed=True)
    source = exported(module, torch.randn(3, 7, 16), True, tmp_path / "m.onnx")
    result = fold(source, only=TABLES, protect="attention.in_proj_weight")
    assert not result.report.folded
    assert proto(result.model) == proto(source)


@pytest.mark.parametrize("dynamo", [True, False])
def test_detr_s_first_decoder_layer_as_exported(dynamo, tmp_path):
    """Queries and keys become ``n`` rows, values one, which is the bias."""
    d, n = 16, 5
    torch.manual_seed(0)
    source = exported(Decoder(d, n), torch.randn(3, n, d), dynamo, tmp_path / "m.onnx")
    result = folded(source, only=TABLES)
    assert result.report.saving.weights == 2 * (d * d + d - n * d) + d * d

"""``--objective bytes-read``: what depends on a row of a table alone becomes a table itself."""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir
import pytest
from helpers import announced_is_done, assert_same_function, graph, normal, operators, weights

import onnx_fold

V, D, F = 11, 8, 12


def text(body: str, **held: np.ndarray) -> ir.Model:
    """``body`` makes ``y`` of ``x``, the rows of ``E`` that the tokens pick."""
    head = f"(int64[b, t] ids) => (float[b, t, {D}] y)"
    return graph(f"{head} {{ x = Gather(E, ids) {body} }}", **{"E": normal(V, D)} | held)


def read(model: ir.Model, **options) -> onnx_fold.FoldResult:
    """Fold ``model`` for as few bytes a token as can be."""
    with announced_is_done():
        result = onnx_fold.fold(model, objective="bytes-read", verify=False, **options)
    assert_same_function(model, result.model, {"b": 2, "t": 5})
    saving, folds = result.report.saving, [s.folded for s in result.report.folded]
    size = next(iter(model.graph.initializers.values())).dtype.itemsize
    assert saving.before.read - saving.after.read == size * sum(f.reads_removed for f in folds)
    return result


MIX = "c = CumSum(q, one) y = Add(x, c)"
"""Rows are mixed, and the residual is added."""
ONE = np.array(1)
NORM = "h = LayerNormalization(x, g)"


def test_a_layer_behind_a_norm_becomes_a_table():
    """The token reads a row in place of ``d²`` weights and the gain; the residual stays."""
    source = text(f"{NORM} q = MatMul(h, W) {MIX}", g=normal(D), W=normal(D, D), one=ONE)
    result = read(source)
    (fold,) = [stream.folded for stream in result.report.folded]
    assert (fold.strategy, fold.reads_removed) == ("tables", D * D + D - D)
    assert fold.weights_removed == D * D + D - V * D
    assert operators(result.model) == ["Gather", "Gather", "CumSum", "Add"]


@pytest.mark.parametrize("objective", ["speed", "size"])
def test_no_other_objective_takes_it(objective):
    source = text(f"{NORM} q = MatMul(h, W) {MIX}", g=normal(D), W=normal(D, D), one=ONE)
    assert not onnx_fold.fold(source, objective=objective, verify=False).report.folded


def test_a_whole_feed_forward_of_a_parallel_block():
    """``x + f(norm(x)) + attention``: all of ``f`` is a table, and what it read is gone."""
    body = f"""{NORM} u = MatMul(h, U) a = Sigmoid(u) m = Mul(u, a) n = MatMul(m, O) q = Add(n, o)
        {MIX}"""
    held = {"g": normal(D), "U": normal(D, F), "O": normal(F, D, seed=1), "o": normal(D, seed=2)}
    result = read(text(body, one=ONE, **held))
    (fold,) = [stream.folded for stream in result.report.folded]
    assert fold.reads_removed == D + 2 * D * F + D - D
    assert fold.text == "{MatMul -> u, MatMul -> n} into Gather -> x"
    assert "Sigmoid" not in operators(result.model)


def test_a_table_that_nothing_else_reads_goes():
    result = read(text("q = MatMul(x, W) t = Tanh(q) y = CumSum(t, one)", W=normal(D, D), one=ONE))
    assert weights(result.model) == V * D
    assert operators(result.model) == ["Gather", "CumSum"]


def test_a_table_that_the_head_reads_too():
    """A tied table is read whole, and stays."""
    body = (
        "q = MatMul(x, W) c = CumSum(q, one) Et = Transpose(E) l = MatMul(c, Et) y = MatMul(l, E)"
    )
    result = read(text(body, W=normal(D, D), one=ONE), only=["tables"])
    (fold,) = [stream.folded for stream in result.report.folded]
    assert fold.reads_removed == D * D - D


def test_learned_positions_say_why_not():
    body = """p = Gather(P, places) s = Add(x, p) h = LayerNormalization(s, g)
        q = MatMul(h, W) c = CumSum(q, one) y = Add(s, c)"""
    held = {"P": normal(9, D, seed=3), "places": np.arange(5), "g": normal(D), "W": normal(D, D)}
    source = text(body, one=ONE, **held)
    result = read(source, only=["tables"])
    assert not result.report.folded
    (reason,) = [
        reason for stream in result.report.streams for reason in stream.reasons if "rows" in reason
    ]
    assert (
        "mixes rows of 'Gather -> x' and 'Gather -> p', which are picked each for itself" in reason
    )


def test_it_may_not_more_than_double_what_is_stored():
    body = "q = MatMul(x, W) c = CumSum(q, one) s = MatMul(c, W2) y = Add(x, s)"
    held = {"W": normal(D, 20), "W2": normal(20, D), "one": ONE}
    source = text(body, **held)
    assert read(source, only=["tables"]).report.folded
    source = text(body, **held | {"E": normal(100, D)})
    result = read(source, only=["tables"])
    assert not result.report.folded
    reasons = [reason for stream in result.report.streams for reason in stream.reasons]
    assert any("and the model over 2 times those that it had" in reason for reason in reasons)


def test_a_row_that_is_as_long_as_the_weight():
    source = text(
        "q = MatMul(x, W) c = CumSum(q, one) y = Add(x, c)",
        one=ONE,
        E=normal(V, 1),
        W=normal(1, D),
    )
    result = read(source, only=["tables"])
    reasons = [reason for stream in result.report.streams for reason in stream.reasons]
    assert any("one token would read as many weights, and 0 more" in reason for reason in reasons)


def test_a_merge_of_a_layer_into_its_table_counts_what_is_read():
    """The table grows, and the layer is read no more."""
    body = "q = MatMul(x, W) c = CumSum(q, one) y = MatMul(c, R)"
    source = text(body, W=normal(D, 9), R=normal(9, D), one=ONE)
    result = read(source, only=["merge"])
    (fold,) = [stream.folded for stream in result.report.folded]
    assert fold.weights_removed == D * 9 - V
    assert fold.reads_removed == D * 9 + D - 9


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_in_every_type(dtype):
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    held = {"E": normal(V, D), "g": normal(D), "W": normal(D, D)}
    source = graph(
        f"(int64[b, t] ids) => ({kind}[b, t, {D}] y) {{ x = Gather(E, ids) {NORM}"
        " q = MatMul(h, W) s = Softmax <axis = 1> (q) y = Add(x, s) }",
        **{name: array.astype(dtype) for name, array in held.items()},
    )
    assert read(source).report.folded


def test_the_report_says_that_the_file_grew():
    source = text(f"{NORM} q = MatMul(h, W) {MIX}", g=normal(D), W=normal(D, D), one=ONE)
    result = onnx_fold.fold(source, objective="bytes-read")
    assert result.report.proof.error < 1e-12
    assert result.report.verification.ok
    assert "The file grew so that one token reads less of it" in " ".join(
        str(result.report).split()
    )
    assert result.report.to_dict()["read_ratio"] > 1


def test_it_is_proved_by_pieces_where_the_model_is_large(monkeypatch):
    """One piece begins at the tokens: the embedding is read no more."""
    monkeypatch.setattr("onnx_fold.check.proof.WHOLE", 0)
    body = f"{NORM} q = MatMul(h, W) c = CumSum(q, one) y = MatMul(c, R)"
    source = text(body, g=normal(D), W=normal(D, 9), R=normal(9, D), one=ONE)
    proof = onnx_fold.fold(source, objective="bytes-read").report.proof
    assert (proof.scope, len(proof.proved)) == ("each stream", 1)
    assert proof.error < 1e-12


# --- As exporters write it -----------------------------------------------------------------------

torch = pytest.importorskip("torch")


class Norm(torch.nn.Module):
    """RMSNorm, as Llama writes it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(1 + 0.1 * torch.randn(d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Block(torch.nn.Module):
    """A residual block with rotary positions."""

    def __init__(self, d: int, heads: int, packed: bool) -> None:
        super().__init__()
        self.heads, self.packed = heads, packed
        names = ["qkv"] if packed else ["q", "k", "v"]
        self.into = torch.nn.ModuleDict(
            {name: torch.nn.Linear(d, len(name) * d, bias=packed) for name in names}
        )
        self.o, self.up = torch.nn.Linear(d, d, bias=False), torch.nn.Linear(d, 2 * d, bias=False)
        self.gate, self.down = torch.nn.Linear(d, 2 * d, bias=False), torch.nn.Linear(2 * d, d)
        self.norms = torch.nn.ModuleList([Norm(d), Norm(d)])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.norms[0](x)
        parts = [layer(h) for layer in self.into.values()]
        parts = list(parts[0].chunk(3, -1)) if self.packed else parts
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in parts)
        q, k = (
            each * cos + torch.cat((-each[..., 1::2], each[..., ::2]), -1) * sin for each in (q, k)
        )
        a = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


class Decoder(torch.nn.Module):
    """Tokens, two blocks, logits."""

    def __init__(self, packed: bool, tied: bool, d: int = 16) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(V, d)
        self.blocks = torch.nn.ModuleList([Block(d, 2, packed) for _ in range(2)])
        self.norm, self.head = Norm(d), torch.nn.Linear(d, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        angles = torch.arange(9)[:, None] * torch.rand(d // 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return self.head(self.norm(x))


@pytest.mark.parametrize(
    ("dynamo", "packed", "tied"),
    [(True, True, False), (True, False, True), (False, True, True), (False, False, False)],
)
def test_the_first_layer_of_a_model_with_rotary_positions(dynamo, packed, tied, tmp_path):
    """Its queries, keys and values are tables, in front of the rotation; nothing else changes."""
    d, path = 16, tmp_path / "m.onnx"
    torch.manual_seed(0)
    ids = torch.randint(0, V, (2, 7))
    how = {"dynamic_axes": {"ids": {0: "b"}}, "opset_version": 17}
    if dynamo:
        how = {"dynamic_shapes": ({0: torch.export.Dim("b", min=2)},), "external_data": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Decoder(packed, tied).eval(), (ids,), path, dynamo=dynamo, input_names=["ids"], **how
        )
    source = ir.load(path)
    result = onnx_fold.fold(path, objective="bytes-read")
    folds = [stream.folded for stream in result.report.folded]
    assert [fold.strategy for fold in folds] == ["tables"] * (1 if packed else 3)
    bias = 3 * d if packed else 0
    removed = sum(fold.reads_removed for fold in folds)
    assert 3 * d * d + bias + d - 3 * d <= removed <= 3 * d * d + bias + d - 3 * d + 3
    count = operators(source).count("MatMul") - operators(result.model).count("MatMul")
    assert count == len(folds)
    assert result.report.verification.ok
    assert len(result.report.proof.proved) == len(folds)

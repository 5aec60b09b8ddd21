"""Interpolate: rows of a tall writer, or columns of a wide reader, as the basis of the stream."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_function, fold, folded, graph, normal, operators, refused, square

from onnx_fold.algebra.exact import checked
from onnx_fold.algebra.expression import FoldedTensor
from onnx_fold.check import interpreter, proof
from onnx_fold.check.proof import prove
from onnx_fold.engine.candidate import Candidate, Options
from onnx_fold.engine.folding import fold_streams
from onnx_fold.errors import UsageError
from onnx_fold.passes import InterpolatePass
from onnx_fold.streams.stream import find_streams

D, F, N = 6, 16, 9
FFN = {"M": normal(N, F, seed=1), "O": normal(F, D, seed=2), "R": normal(D, 64, seed=3)}
HEAD = "(float[b, n, 9] x) => (float[b, n, 64] y)"
MLP = "a = MatMul(x, M) h = Relu(a)"


def model(body: str = f"{MLP} s = MatMul(h, O) y = MatMul(s, R)", opset: int = 18, **held):
    return graph(f"{HEAD} {{ {body} }}", opset, **(FFN | held))


def interpolated(source, removed: int = D * D, **options):
    result = folded(source, removed, only=["interpolate"], **options)
    assert {stream.folded.strategy for stream in result.report.folded} == {"interpolate"}
    return result


def test_rows_of_the_writer_are_the_basis():
    result = interpolated(model())
    assert operators(result.model) == ["MatMul", "Relu", "Split", "MatMul", "Add", "MatMul"]
    weights = result.model.graph.initializers
    assert weights["O_rest"].const_value.shape == (F - D, D)
    assert abs(weights["O_rest"].const_value.numpy()).max() <= 1.5
    moved = {tuple(column) for column in weights["M"].const_value.numpy().T}
    assert moved == {tuple(column) for column in FFN["M"].T}  # reordered, nothing else


def test_the_order_goes_through_glu_and_biases():
    glu = "g = MatMul(x, G) gb = Add(g, c) act = Sigmoid(gb) a = MatMul(x, M) h = Mul(act, a)"
    source = model(
        f"{glu} s = MatMul(h, O) y = MatMul(s, R)", G=normal(N, F, seed=5), c=normal(F, seed=6)
    )
    assert "Gather" not in operators(interpolated(source).model)


def test_the_order_goes_through_gelu_as_a_product():
    gelu = "a = MatMul(x, M) e = Erf(a) o = Add(e, one) h = Mul(a, o)"
    source = model(f"{gelu} s = MatMul(h, O) y = MatMul(s, R)", one=np.float32(1.0).reshape(()))
    assert "Gather" not in operators(interpolated(source).model)


@pytest.mark.parametrize("shape", [(3, 1), (1,), (), (3, F)])
def test_the_order_leaves_what_all_channels_share(shape):
    source = graph(
        "(float[3, 9] x) => (float[3, 64] y)"
        " { a = Gemm(x, M, c) h = Relu(a) s = MatMul(h, O) y = MatMul(s, R) }",
        **FFN,
        c=np.resize(normal(3, F, seed=5), shape),
    )
    assert "Gather" not in operators(interpolated(source).model)


@pytest.mark.parametrize(
    "hidden",
    [
        "a = MatMul(x, M) h = Softmax(a)",  # mixes the channels
        "x0 = Relu(x) h = Concat<axis = -1>(x0, x0, x0)",
    ],
)
def test_an_order_that_cannot_be_carried_is_done_on_the_value(hidden):
    held = {"O": normal(27, D, seed=2)} if "Concat" in hidden else {}
    source = model(f"{hidden} s = MatMul(h, O) y = MatMul(s, R)", **held)
    result = interpolated(source)
    assert operators(result.model).count("Gather") == 1


def test_another_reader_of_the_hidden_value_gets_the_order_too():
    body = f"{MLP} s = MatMul(h, O) y0 = MatMul(s, R) z = MatMul(h, W) y = Add(y0, z)"
    result = interpolated(model(body, W=normal(F, 64, seed=7)))
    assert "Gather" not in operators(result.model)


def test_a_hidden_value_that_is_an_output_keeps_its_order():
    head = "(float[b, n, 9] x) => (float[b, n, 64] y, float[b, n, 16] h)"
    source = graph(f"{head} {{ {MLP} s = MatMul(h, O) y = MatMul(s, R) }}", **FFN)
    assert "Gather" in operators(interpolated(source).model)


@pytest.mark.parametrize(("rank", "opset"), [(D, 18), (D, 11), (3, 18), (0, 18)])
def test_a_rank_deficient_writer_needs_no_inverse(rank, opset):
    low = normal(F, D, seed=2)
    if rank < D:
        low = normal(F, max(rank, 1), seed=2) @ normal(max(rank, 1), D, seed=8) * (rank > 0)
    interpolated(model(opset=opset, O=low.astype(np.float32)))


def test_a_bias_of_the_writer():
    body = f"{MLP} p = MatMul(h, O) s = Add(p, c) y = MatMul(s, R)"
    result = interpolated(model(body, c=normal(D, seed=9)))
    assert operators(result.model).count("Add") == 2


def test_a_bias_of_a_rank_deficient_writer_is_carried_through_the_reader():
    low = (normal(F, 2, seed=2) @ normal(2, D, seed=8)).astype(np.float32)
    body = f"{MLP} p = MatMul(h, O) s = Add(p, c) y0 = MatMul(s, R) y = Add(y0, r)"
    source = model(body, c=normal(D, seed=9), O=low, r=normal(64, seed=10))
    interpolated(source, D * D + D)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_a_bias_of_a_gemm_stays_narrow_where_its_reader_has_none(beta):
    gemm = f"p = Gemm<beta = {beta}>(h, O, c)"
    head = "(float[n, 9] x) => (float[n, 64] y)"
    held = FFN | {"c": normal(D, seed=9)}
    source = graph(f"{head} {{ {MLP} {gemm} y = MatMul(p, R) }}", **held)
    result = interpolated(source)
    assert operators(result.model)[-4:] == ["MatMul", "Add", "Add", "MatMul"]
    biased = graph(
        f"{head} {{ {MLP} {gemm} y0 = MatMul(p, R) y = Add(y0, r) }}", **held, r=FFN["R"][0]
    )
    assert operators(interpolated(biased, D * D + D).model)[-4:] == [
        "MatMul",
        "Add",
        "MatMul",
        "Add",
    ]


def test_a_parallel_branch_is_expressed_in_the_same_basis():
    body = f"{MLP} s1 = MatMul(h, O) s2 = MatMul(x, P) s = Add(s1, s2) y = MatMul(s, R)"
    interpolated(model(body, P=normal(N, D, seed=11)))


def test_columns_of_a_wide_reader_behind_a_table():
    body = "s = Gather(E, x) q = MatMul(s, Q) a = MatMul(s, R) h = Relu(a) y = MatMul(h, O)"
    head = "(int64[b, n] x) => (float[b, n, 3] q, float[b, n, 6] y)"
    held = {"E": normal(50, D, seed=1), "Q": normal(D, 3, seed=2), "R": normal(D, 64, seed=3)}
    source = graph(f"{head} {{ {body} }}", **held, O=normal(64, D, seed=4))
    result = interpolated(source)
    assert operators(result.model).count("Concat") == 1
    assert result.model.graph.initializers["R_rest"].const_value.shape == (D, 64 - D)


def test_gate_is_cut_and_up_follows():
    glu = "g = MatMul(s, R) sg = Sigmoid(g) u = MatMul(s, U) h = Mul(sg, u) y = MatMul(h, O)"
    source = graph(
        f"(int64[b, n] x) => (float[b, n, 6] y) {{ s = Gather(E, x) {glu} }}",
        E=normal(50, D, seed=1),
        R=normal(D, 64, seed=3),
        U=normal(D, 64, seed=5),
        O=normal(64, D, seed=4),
    )
    interpolated(source)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_storage_types(dtype):
    held = {name: array.astype(dtype) for name, array in FFN.items()}
    kind = {np.float64: "double", np.float16: "float16"}[dtype]
    text = f"{{ {MLP} s = MatMul(h, O) y = MatMul(s, R) }}"
    source = graph(f"{HEAD.replace('float', kind)} {text}", **held)
    result = interpolated(source)
    assert result.model.graph.initializers["O_rest"].const_value.numpy().dtype == dtype


def test_a_wide_writer_has_no_rows_to_spare():
    """The columns of the reader serve; a Gather that moves more than is saved does not pay."""
    body, square = f"{MLP} s = MatMul(h, O) r = MatMul(s, R)", normal(F, F, seed=2)
    wide = model(f"{body} y = Relu(r)", O=square, R=normal(F, F * F // 4))
    assert "no strategy applies" in refused(wide, only=["interpolate"])
    narrow = model(f"{body} y = Concat<axis = -1>(r, r)", O=square, R=normal(F, F * F // 8))
    result = folded(narrow, F * F, only=["interpolate"])
    assert operators(result.model)[-4:] == ["MatMul", "Concat", "Gather", "Concat"]


def test_an_infinite_weight_is_refused():
    broken = FFN["O"].copy()
    broken[3, 3] = np.inf
    assert "not finite" in refused(model(O=broken), only=["interpolate"])


def test_folding_twice_changes_nothing_more():
    assert not fold(fold(model()).model).report.folded


def test_it_is_taken_where_absorbing_is_too_inaccurate():
    left, right = (np.linalg.qr(normal(D, D, seed=i))[0] for i in (11, 12))
    q = (left * np.logspace(0, -6, D) @ right).astype(np.float32)  # hopeless in float32
    head = "(float[b, n, 9] x) => (float[b, n, 6] q, float[b, n, 64] y)"
    body = f"{MLP} s = MatMul(h, O) q = MatMul(s, Q) y = MatMul(s, R)"
    source = graph(f"{head} {{ {body} }}", **FFN, Q=q)
    result = folded(source, D * D)
    (stream,) = result.report.folded
    assert stream.folded.strategy == "interpolate"
    assert any(c.strategy == "absorb" and c.refused for c in stream.candidates)
    assert fold(source, strategy="absorb", force=True).report.folded


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scales_do_not_matter(scale):
    source = model(O=FFN["O"] * np.float32(scale), R=FFN["R"] / np.float32(scale))
    interpolated(source)


def test_rows_of_very_different_size():
    sizes = np.logspace(-6, 6, F).astype(np.float32)[:, None]
    interpolated(model(O=FFN["O"] * sizes))


def ffn_behind_a_table(kind: str):
    """An FFN of which the first layer can only give columns, the last one only rows."""
    inner = {
        "mlp": "a = MatMul(s, M) h = Relu(a)",
        "glu": "g = MatMul(s, M) a = Sigmoid(g) u = MatMul(s, U) h = Mul(a, u)",
    }[kind]
    text = f"{{ s = Gather(E, x) {inner} t = MatMul(h, O) y = MatMul(t, R) }}"
    held = {"M": normal(D, F, seed=1), "O": FFN["O"], "R": FFN["R"]}
    more = {"U": normal(D, F, seed=5)} if kind == "glu" else {}
    head = "(int64[b, n] x) => (float[b, n, 64] y)"
    return graph(f"{head} {text}", E=normal(50, D, seed=4), **held, **more)


@pytest.mark.parametrize("kind", ["mlp", "glu"])
@pytest.mark.parametrize("first", ["M", "O"])
def test_columns_and_rows_of_one_hidden_value_need_no_gather(kind, first):
    """The columns stand first, the rows last, whichever stream is folded first."""
    source = ffn_behind_a_table(kind)
    half = fold(source, only=["interpolate"], protect=["R" if first == "M" else "E"])
    assert [stream.folded.strategy for stream in half.report.folded] == ["interpolate"]
    result = interpolated(half.model)
    assert operators(result.model).count("Gather") == 1  # the table
    assert operators(result.model)[-4:] == ["Split", "MatMul", "Add", "MatMul"]
    interpolated(source, 2 * D * D)


def test_rows_that_columns_leave_no_room_for_are_put_in_order():
    """Of ``F = 16`` rows ten may move, not enough for a basis of twelve."""
    wide = 12
    source = graph(
        "(int64[b, n] x) => (float[b, n, 64] y)"
        " { s = Gather(E, x) a = MatMul(s, M) h = Relu(a) t = MatMul(h, O) y = MatMul(t, R) }",
        E=normal(50, D, seed=4),
        M=normal(D, F, seed=1),
        O=normal(F, wide, seed=2),
        R=normal(wide, 64, seed=3),
    )
    half = fold(source, only=["interpolate"], protect=["R"])
    result = interpolated(half.model, wide * wide)
    assert operators(result.model).count("Gather") == 2


def test_what_costs_more_time_than_it_saves_is_said_and_left_to_a_target():
    source = model()
    report = fold(source, only=["interpolate"]).report
    assert report.folded[0].folded.slower_on == {"cpu": "decode", "cuda": "decode"}
    assert [len(folds) for folds in report.slower_on.values()] == [1, 1]
    assert "+2 operators" in refused(source, only=["interpolate"], target="cpu")
    with pytest.raises(UsageError, match="unknown target"):
        fold(source, target="tpu")


@pytest.mark.parametrize(("width", "slower"), [(1024, "prefill"), (2048, None)])
def test_an_order_put_right_by_a_gather_pays_in_wide_models_only(width, slower):
    """A softmax keeps the order of the hidden value: the Gather moves 3 values a channel."""
    shapes = {"M": (1, 3 * width), "O": (3 * width, width), "R": (width, 4 * width)}
    held = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    body = "{ a = MatMul(x, M) h = Softmax(a) s = MatMul(h, O) y = MatMul(s, R) }"
    source = graph(f"(float[b, 1] x) => (float[b, {4 * width}] y) {body}", **held)
    (stream,) = (s for s in find_streams(source) if s.width == width and s.is_closed)
    candidate, *_ = InterpolatePass().candidates(stream)
    assert candidate.slower_on(4).get("cpu") == slower


def test_a_neighbour_whose_weight_is_picked_by_a_gather_waits_for_its_order():
    source = graph(
        "(float[2, n, 9] x) => (float[2, n, 64] y, float[2, n, 7] z)"
        " { a = MatMul(x, M) s = MatMul(a, O) y = MatMul(s, R)"
        " p = Gather(experts, which) c = MatMul(a, p) z = MatMul(c, Z) }",
        **FFN | {"M": normal(2, N, F, seed=1)},
        experts=normal(1, F, F + 2, seed=5),
        which=np.array(0),
        Z=normal(F + 2, 7, seed=6),
    )
    result = fold(source)
    assert result.report.folded
    assert_same_function(source, result.model)


# --- In part --------------------------------------------------------------------------------------

WIDE, TALL = 80, 200


def wide_model(kind: str = "float16", opset: int = 18, body: str = "", **held: np.ndarray):
    """A stream of 80 channels; in 16 bits all of its rows are not accurate enough for speed."""
    weights = {"M": normal(N, TALL, seed=1), "O": normal(TALL, WIDE, seed=2)}
    weights |= {"R": normal(WIDE, 96, seed=3)} | held
    body = body or "a = MatMul(x, M) h = Relu(a) s = MatMul(h, O) y = MatMul(s, R)"
    text = f"({kind}[b, n, 9] x) => ({kind}[b, n, 96] y) {{ {body} }}"
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64}.get(kind)
    dtype = dtype or ml_dtypes.bfloat16
    return graph(text, opset, **{name: array.astype(dtype) for name, array in weights.items()})


def in_part(source, kept: int, fold=folded, **options):
    """Fold ``source``, whose other candidates are not offered."""
    every = InterpolatePass.candidates

    def some(self, stream):
        for whole in every(self, stream):
            offered = (whole, *whole.in_part())
            yield from (each for each in offered if each.text.startswith(f"{kept} "))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpolatePass, "candidates", some)
        return fold(source, only=["interpolate"], **options)


@pytest.mark.parametrize("kept", [72, 80])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_rows_that_condition_the_basis_badly_are_left_out(kind, kept):
    result = in_part(wide_model(kind), kept)
    assert result.report.saving.weights == kept * WIDE
    pad = ["Pad"] if kept < WIDE else []
    assert operators(result.model)[2:] == ["Split", "MatMul", *pad, "Add", "MatMul"]
    assert result.model.graph.initializers["O_rest"].const_value.shape == (TALL - kept, WIDE)
    assert prove(result.original, result.model, result.report.folded).error < 1e-12


COLUMNS = "p = MatMul(x, P) q = MatMul(p, M) h = Relu(q) y = MatMul(h, R)"
"""A stream of 80 channels whose reader is 200 wide; merging the layer in front would cost more."""


def columns(kind: str = "float", body: str = COLUMNS, **held: np.ndarray):
    held = {"P": normal(N, WIDE), "M": normal(WIDE, TALL, seed=4), "R": normal(TALL, 96)} | held
    return wide_model(kind, body=body, **held)


@pytest.mark.parametrize("kept", [72, 80])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_columns_that_condition_the_basis_badly_are_left_out(kind, kept):
    result = in_part(columns(kind), kept)
    assert result.report.saving.weights == kept * WIDE
    split = ["Split"] if kept < WIDE else []
    assert sorted(operators(result.ir)) == sorted(
        ["MatMul", *split, "MatMul", "Concat", "Relu", "MatMul"]
    )
    assert result.ir.graph.initializers["M_rest"].const_value.shape == (WIDE, TALL - kept)
    assert prove(result.original, result.ir, result.report.folded).error < 1e-12


def test_columns_in_part_of_a_stream_with_other_readers_and_a_table():
    body = """
        e = Gather(E, t) p = MatMul(x, P) s = Add(e, p) q = MatMul(s, M) u = Add(q, c)
        h = Relu(u) m = MatMul(h, R) v = MatMul(s, V) y = Add(m, v)
    """
    held = {"E": normal(30, WIDE, seed=5), "V": normal(WIDE, 96, seed=6), "c": normal(TALL, seed=8)}
    text = f"(float[b, n, 9] x, int64[b, n] t) => (float[b, n, 96] y) {{ {body} }}"
    held |= {"P": normal(N, WIDE), "M": normal(WIDE, TALL, seed=4), "R": normal(TALL, 96)}
    result = in_part(graph(text, **held), 72)
    assert result.report.saving.weights == 72 * WIDE
    assert "Gather" in operators(result.ir)  # that of the table, and no other
    assert operators(result.ir).count("Gather") == 1


def test_columns_in_part_whose_order_is_not_free():
    body = COLUMNS.replace("Relu(q)", "Softmax(q)")
    result = in_part(columns(body=body), 72)
    assert operators(result.ir).count("Gather") == 1


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("kind", ["float", "float16", "bfloat16"])
def test_a_completed_basis_is_proved(kind, is_large, monkeypatch):
    monkeypatch.setattr(proof, "WHOLE", 0 if is_large else proof.WHOLE)
    monkeypatch.setattr(interpreter, "LARGE", 1 if is_large else interpreter.LARGE)
    result = in_part(wide_model(kind), 72, fold)  # few kernels for bfloat16: it is not run
    (stream,) = result.report.folded
    found = prove(result.original, result.model, result.report.folded)
    assert found.proved == [stream.name]
    assert found.error < 1e-12
    for value in result.model.graph.initializers.values():
        if isinstance(value.const_value, FoldedTensor):
            checked(value.const_value)
            assert pickle.loads(pickle.dumps(value.const_value)).size == value.const_value.size


@pytest.mark.parametrize("opset", [10, 11, 13])
def test_any_opset_can_pad(opset):
    result = in_part(wide_model("float", opset), 72)
    assert "Pad" in operators(result.model)


def test_a_bias_and_another_writer_are_written_in_the_completed_basis():
    body = "a = MatMul(x, M) h = Relu(a) p = MatMul(h, O) q = Add(p, c) t = MatMul(x, P)"
    held = {"c": normal(WIDE, seed=9), "P": normal(N, WIDE, seed=11)}
    result = in_part(wide_model("float", body=f"{body} s = Add(q, t) y = MatMul(s, R)", **held), 72)
    assert result.report.saving.weights == 72 * WIDE


def test_rows_left_out_beside_channels_that_are_not_free():
    """Behind a Concat only the last channels can be reordered, the others stay in front."""
    body = "a = MatMul(x, M) j = Concat<axis = -1>(x, a) h = Relu(j)"
    held = {"O": normal(TALL + N, WIDE, seed=2)}
    source = wide_model("float", body=f"{body} s = MatMul(h, O) y = MatMul(s, R)", **held)
    result = in_part(source, 72)
    assert "Gather" not in operators(result.model)


def test_the_largest_part_within_the_limit_is_taken():
    """Speed gives rows for accuracy, size takes up to 6 times the error: one limit, one knob."""
    held = {"O": normal(1200, 336, seed=2), "M": normal(N, 1200, seed=1), "R": normal(336, 96)}
    source = wide_model(**held)
    for objective, most in (("size", 6.0), ("speed", 3.0)):
        result = fold(source, only=["interpolate"], objective=objective)
        (stream,) = result.report.folded
        *refusals, taken = stream.candidates
        assert taken.error <= (most + 0.05) * taken.error_original
        assert len(refusals) == (0 if objective == "size" else len(refusals))
        for each in refusals:
            assert each.weights_removed > taken.weights_removed
            assert "--objective size takes up to 6.0" in each.refused
    assert refusals


def test_parts_are_bisected(monkeypatch):
    """Of parts that differ in degree only, each probe rules out half."""
    probed = []
    measured = Candidate._measured

    def recorded(self, *given):
        probed.append(self.text)
        return measured(self, *given)

    monkeypatch.setattr(Candidate, "_measured", recorded)
    held = {"O": normal(1200, 336, seed=2), "M": normal(N, 1200, seed=1), "R": normal(336, 96)}
    result = fold(wide_model(**held), only=["interpolate"], objective="speed")
    (stream,) = result.report.folded
    assert len(probed) <= 1 + 3  # all rows, and three of the parts
    errors = {each.weights_removed: each.error for each in stream.candidates}
    assert sorted(errors.values()) == [errors[size] for size in sorted(errors)]
    (closed,) = (each for each in find_streams(result.original) if each.is_closed)
    offered = [each for each in InterpolatePass().candidates(closed) if each.degree_of]
    taken = stream.folded.weights_removed
    larger = min(each.weights_removed for each in offered if each.weights_removed > taken)
    assert errors[larger] > 3 * stream.folded.error_original  # the next larger one was ruled out


def test_a_part_that_is_taken_back_leaves_a_smaller_one():
    """What the judgement of the whole model takes back is given up by a degree, not whole."""
    held = {"O": normal(1200, 336, seed=2), "M": normal(N, 1200, seed=1), "R": normal(336, 96)}
    taken_back: dict[str, str] = {}
    rows = []
    for _ in range(3):
        options = Options(target="cpu", taken_back=dict(taken_back))
        streams = fold_streams(wide_model(**held), [InterpolatePass(options)], options)
        (taken,) = (stream.folded for stream in streams if stream.folded)
        rows.append(taken.weights_removed // 336)
        taken_back[taken.name] = "with it, the model is too far off"
    assert rows == sorted({*rows}, reverse=True)


def test_all_of_a_stream_goes_before_a_part_of_it():
    """Absorbing all of d² is preferred to rows that leave a tenth, though these are offered too."""
    held = {"Q": square(336), "O": normal(1200, 336, seed=2), "M": normal(N, 1200, seed=1)}
    held |= {"R": normal(336, 96), "S": normal(336, 96, seed=4)}
    body = "a = MatMul(x, M) h = Relu(a) s = MatMul(h, O) q = MatMul(s, Q) r = Relu(q)"
    both = wide_model(body=f"{body} k = MatMul(s, R) l = MatMul(r, S) y = Add(k, l)", **held)
    (stream,) = fold(both, skip=["merge"]).report.folded
    assert stream.folded.strategy == "absorb"
    assert stream.folded.weights_removed == 336**2
    assert "8 rows" not in "".join(each.text for each in stream.candidates)


# --- Convolutions ---------------------------------------------------------------------------------

BOTTLENECK = {
    "E": normal(24, 6, 1, 1),
    "e": normal(24, seed=1),
    "D": normal(24, 1, 3, 3, seed=2),
    "c": normal(24, seed=3),
    "P": normal(6, 24, 1, 1, seed=4),
    "p": normal(6, seed=5),
    "F": normal(9, 6, 1, 1, seed=6),
    "f": normal(9, seed=7),
    "G": normal(9, 6, 1, 1, seed=8),
}
HIDDEN = (
    "h0 = Conv(x, E, e) h1 = Relu(h0) h2 = Conv<group = 24, pads = [1, 1, 1, 1]>(h1, D, c)"
    " h = Clip(h2, low, high)"
)
IMAGE = "(float[n, 6, 5, 4] x) => (float[n, 9, 5, 4] z)"


def bottleneck(body: str):
    limits = {"low": np.array(0.0, np.float32), "high": np.array(6.0, np.float32)}
    return graph(f"{IMAGE} {{ {HIDDEN} {body} }}", **BOTTLENECK, **limits)


def test_rows_of_a_projection_of_an_image():
    """MobileNetV2: the order of the rows goes through the depthwise convolution in front."""
    source = bottleneck(
        "y = Conv(h, P, p) a = Conv(y, F, f) b = Conv(y, G) s = Add(a, b) z = Relu(s)"
    )
    result = folded(source, 6 * 6, only=["interpolate"], objective="size")
    found = operators(result.model)
    assert "Gather" not in found
    assert found.count("Conv") == operators(source).count("Conv")


def test_rows_of_a_projection_of_an_image_that_is_grouped_in_another_way():
    """Groups of two channels cannot be put in another order: an index does it."""
    source = graph(
        f"{IMAGE} {{ h1 = Conv(x, E, e) h2 = Conv<group = 12>(h1, D2) h = Relu(h2)"
        " y = Conv(h, P, p) a = Conv(y, F, f) z = Relu(a) }",
        **{name: BOTTLENECK[name] for name in "EePpFf"},
        D2=normal(24, 2, 1, 1, seed=2),
    )
    result = folded(source, only=["interpolate"], objective="size")
    assert "Gather" in operators(result.model)


def test_rows_in_part_of_a_projection_of_an_image():
    """``[h, 0] + h₂ B``: the zeros stand where the channels are."""
    source = graph(
        "(float[2, 8, 3, 4] x) => (float[2, 64, 3, 4] z) { h0 = Conv(x, E) h = Relu(h0)"
        " y = Conv(h, P, p) a = Conv(y, R) z = Relu(a) }",
        E=normal(200, 8, 1, 1),
        P=normal(80, 200, 1, 1, seed=1),
        p=normal(80, seed=2),
        R=normal(64, 80, 1, 1, seed=3),
    )
    result = in_part(source, 72)
    assert result.report.saving.weights == 72 * 80
    assert "Pad" in operators(result.model)
    assert_same_function(source, result.model)


def test_columns_of_a_convolution_of_an_image():
    source = graph(
        "(float[n, 9, 5, 4] x) => (float[n, 24, 5, 4] z) { y = Conv(x, P) r = Conv(y, Q)"
        " a = Conv(y, W) h = Relu(a) b = Relu(r) c = Conv(h, V) s = Add(c, b) z = Relu(s) }",
        P=normal(6, 9, 1, 1),
        Q=normal(24, 6, 1, 1, seed=1),
        W=normal(30, 6, 1, 1, seed=2),
        V=normal(24, 30, 1, 1, seed=3),
    )
    result = folded(source, only=["interpolate"], objective="size")
    assert result.report.saving.weights == 36

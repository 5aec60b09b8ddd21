"""Hazards: graphs in which a fold could change what it must not, and what becomes of them."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import assert_same_function, fold, folded, graph, normal, operators, refused, square

import onnx_fold
from onnx_fold.errors import InvalidModelError

D, F = 4, 5
P, M = square(D, seed=1), normal(D, F, seed=2)
PAIR = "p = MatMul(x, P) y = MatMul(p, M)"
IO = f"(float[n, {D}] x) => (float[n, {F}] y)"


def names(model: ir.Model) -> set[str]:
    return set(model.graph.initializers)


# --- One initializer, several users --------------------------------------------------------------


def test_layers_that_share_their_weights():
    """P and M are used twice, the second time downstream of the first: copies would cost more."""
    text = f"(float[n, {D}] x) => (float[n, {D}] y) {{ p = MatMul(x, P) a = MatMul(p, M)"
    text += " r = Relu(a) q = MatMul(r, P) y = MatMul(q, M) }"
    model = graph(text, P=P, M=square(D, seed=2))
    assert "'M' and 'P' has other readers" in refused(model)


@pytest.mark.parametrize(("rows", "is_worth_it"), [(3, True), (7, False)])
def test_a_copy_is_made_if_it_pays(rows, is_worth_it):
    """x + E P, E also read elsewhere: P goes, a second E comes."""
    text = f"(int64[n] i) => (float[n, {D}] y, float[n, {D}] z)"
    text += " { e = Gather(E, i) a = MatMul(e, P) y = Relu(a) g = Gather(E, i) z = Relu(g) }"
    model = graph(text, E=normal(rows, D), P=P)
    if is_worth_it:
        result = folded(model, removed=D * D - rows * D)
        np.testing.assert_array_equal(
            result.model.graph.initializers["E"].const_value.numpy(), normal(rows, D)
        )
    else:
        assert "'E' has other readers, and a copy would cost as much as is saved" in refused(model)


def test_equal_biases_that_an_exporter_merged():
    text = f"(float[n, {D}] x) => (float[n, {D}] y)"
    text += " { h = MatMul(x, P) p = Add(h, b) q = MatMul(p, Q) y = Add(q, b) }"
    folded(graph(text, P=P, Q=square(D, seed=2), b=normal(D)), removed=D * D)


def test_equal_matrices_that_an_exporter_merged():
    text = f"(float[n, {D}] x) => (float[n, {D}] y) {{ p = MatMul(x, P) y = MatMul(p, P) }}"
    assert "no weights would be saved" in refused(graph(text, P=P))


TIED = """(int64[n] i) => (float[n, 7] y) { e = Gather(E, i) a = MatMul(e, P) r = Relu(a)
    h = MatMul(r, W) """


@pytest.mark.parametrize(
    "head",
    ["t = Transpose(E) y = MatMul(h, t)", "y = Gemm<transB = 1>(h, E)"],
    ids=["Transpose", "Gemm"],
)
def test_tied_embeddings(head):
    """One table for Gather and head: a copy of 7 rows costs more than P or W, of 4 rows, save."""
    model = graph(f"{TIED} {head} }}", E=normal(7, D), P=P, W=square(D, seed=2))
    reasons = refused(model)
    assert "into Gather -> e: 'E' has other readers, and a copy would cost as much" in reasons
    assert "into MatMul -> y: 'E' has" in reasons or "into Gemm -> y: 'E' has" in reasons


def test_tied_embeddings_of_a_small_vocabulary():
    """Characters: a table of 3 rows is worth a copy, once; then the two have nothing to share."""
    model = graph(
        TIED.replace("[n, 7]", "[n, 3]") + " t = Transpose(E) y = MatMul(h, t) }",
        E=normal(3, D), P=P, W=square(D, seed=2),
    )  # fmt: skip
    folded(model, removed=2 * D * D - 3 * D)


def test_a_head_that_reads_the_table_that_wrote_its_stream():
    text = "(int64[n] i) => (float[n, 7] y) { e = Gather(E, i) y = Gemm<transB = 1>(e, E) }"
    assert "weights would grow" in refused(graph(text, E=normal(7, D)))


# --- Values that somebody else sees --------------------------------------------------------------


def test_an_output_inside_a_stream():
    text = f"(float[n, {D}] x) => (float[n, {F}] y, float[n, {D}] p) {{ {PAIR} }}"
    assert "'p' is a graph output" in refused(graph(text, P=P, M=M))


def test_an_output_behind_the_bias_keeps_what_lies_before():
    """b cannot leave the stream, but h, which nobody else sees, may be anything."""
    text = f"(float[n, {D}] x) => (float[n, {F}] y, float[n, {D}] z)"
    text += " { h = MatMul(x, P) k = MatMul(h, Q) z = Add(k, b) y = MatMul(z, M) }"
    model = graph(text, P=P, Q=square(D, seed=3), M=M, b=normal(D))
    result = folded(model, removed=D * D)
    assert [value.name for value in result.model.graph.outputs] == ["y", "z"]


@pytest.mark.parametrize(
    ("weight", "node"), [(f"{D}, {D}] P", "MatMul -> p"), (f"{D}, {F}] M", "MatMul -> y")]
)
def test_a_weight_that_a_caller_can_override(weight, node):
    model = graph(f"(float[n, {D}] x, float[{weight}) => (float[n, {F}] y) {{ {PAIR} }}", P=P, M=M)
    assert f"{node}, which reads '{weight[-1]}', an initializer that a caller can" in refused(model)


def body(inner: str) -> ir.Model:
    """P into M, and an If one branch of which is ``inner``, from ``x``, ``p`` and weights to ``q``.

    The weights P and M are those of the outer graph.
    """
    text = f"(float[n, {D}] x, bool t) => (float[n, {F}] y, float[n, k] z) {{ {PAIR}"
    text += f" z = If(t) <then_branch = a () => (float[n, k] q) {{ {inner} }},"
    text += " else_branch = b () => (float[n, k] r) { r = Identity(x) }> }"
    return graph(text, P=P, M=M)


def test_a_branch_that_reads_a_value_of_the_stream():
    reason = refused(body("q = Identity(p)"))
    assert "'p' is used inside the body of a control-flow operator, by Identity -> q" in reason


def test_a_branch_that_reads_a_weight():
    assert "'P' has other readers" in refused(body("q = MatMul(x, P)"))


def test_a_branch_that_reads_a_value_beside_the_stream():
    result = folded(body("q = Abs(x)"), removed=D * D)
    assert operators(result.model) == ["MatMul", "If"]


def test_names_of_a_branch_are_taken():
    """A copy of M must not be called as a value of the branch is, which would hide it."""
    text = f"""(float[n, {D}] x, bool t) => (float[n, 2] y, float[n, 2] w, float[n, {D}] z)
        {{ {PAIR} v = Abs(x) w = MatMul(v, M)
        z = If(t) <then_branch = a () => (float[n, {D}] q)
        {{ M_folded = Neg(x) q = Abs(M_folded) }},
        else_branch = b () => (float[n, {D}] r) {{ r = Identity(x) }}> }}"""
    result = folded(graph(text, P=P, M=normal(D, 2)), removed=D * D - 2 * D)
    assert "M_folded" not in names(result.model)


LOOP = {"count": np.array(2), "go": np.array(True)}


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        ("o = MatMul(p, N)", "'p' is used inside the body of a control-flow operator, by MatMul"),
        ("o = MatMul(x, P)", "'P' has other readers"),
        ("o = MatMul(x, N)", None),
    ],
)
def test_the_body_of_a_loop(inner, reason):
    text = f"(float[n, {D}] x) => (float[n, {F}] y, float[k, n, m] z) {{ {PAIR}"
    text += " z = Loop(count, go) <body = b (int64 i, bool c) => (bool d, float[n, m] o)"
    text += f" {{ d = Identity(c) {inner} }}> }}"
    model = graph(text, P=P, M=M, **({"N": M} if "N" in inner else {}), **LOOP)
    if reason is None:
        folded(model, removed=D * D)
    else:
        assert reason in refused(model)


def test_the_body_of_a_scan():
    text = f"(float[n, {D}] x, float[k, n, {D}] s) => (float[n, {F}] y, float[k, n, {D}] z)"
    text += f" {{ {PAIR} z = Scan<num_scan_inputs = 1, body = b (float[n, {D}] i)"
    text += f" => (float[n, {D}] o) {{ o = Add(i, p) }}>(s) }}"
    assert "'p' is used inside the body of a control-flow operator, by Add" in refused(
        graph(text, P=P, M=M)
    )
    folded(graph(text.replace("(i, p)", "(i, x)"), P=P, M=M), removed=D * D)


def test_a_chain_in_a_body_is_left_alone():
    text = f"(float[n, {D}] x, bool t) => (float[n, {F}] y) {{"
    text += f" y = If(t) <then_branch = a () => (float[n, {F}] q) {{ p = MatMul(x, P)"
    text += f" q = MatMul(p, M) }}, else_branch = b () => (float[n, {F}] r)"
    text += " { r = MatMul(x, M) }> }"
    refused(graph(text, P=P, M=M))


# --- Operators that depend on the width of the channels, when it changes -------------------------


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 1, 3), (2, 0, -1), (0, -1, 3)])
def test_a_reshape_that_copies_the_width_to_another_axis(shape):
    """P widens 1 to 3, so the stream becomes 1 wide, but 3 rows stay 3 rows."""
    text = "(float[6, 1] x) => (float[a, b, 1] y)"
    text += " { p = MatMul(x, P) r = Reshape(p, s) y = MatMul(r, M) }"
    model = graph(text, P=normal(1, 3), M=normal(3, 1), s=np.array(shape))
    folded(model, removed=5)


def test_a_computed_shape_that_copies_the_width_to_another_axis():
    text = "(float[6, 1] x, float[2] z) => (float[a, b, 1] y) { p = MatMul(x, P) n = Shape(z)"
    text += " c = Concat<axis = 0>(n, s) r = Reshape(p, c) y = MatMul(r, M) }"
    model = graph(text, P=normal(1, 3), M=normal(3, 1), s=np.array([0, 3]))
    assert "copies the width of its channels" in refused(model, only=["merge"])
    assert_same_function(model, fold(model).model)


def test_a_squeeze_that_would_remove_the_channels():
    text = "(float[6, 1, 1] x) => (float[a, 1] y)"
    text += " { p = MatMul(x, P) r = Squeeze(p) y = MatMul(r, M) }"
    model = graph(text, P=normal(1, 3), M=normal(3, 1))
    assert "would remove a single channel" in refused(model)


@pytest.mark.parametrize(("inputs", "width", "outputs"), [(0, 4, 5), (4, 0, 5), (4, 5, 0)])
def test_layers_without_weights(inputs, width, outputs):
    text = f"(float[2, {inputs}] x) => (float[2, {outputs}] y) {{ {PAIR} }}"
    refused(graph(text, P=normal(4, 5)[:inputs, :width], M=normal(5, 5)[:width, :outputs]))


# --- Model-local functions -----------------------------------------------------------------------


def calling(body: str, *functions: str, opset: int = 18, **held: np.ndarray) -> ir.Model:
    """A graph from ``x`` to ``y`` that calls functions of the domain ``local``."""
    header = f'<ir_version: 10, opset_import: ["": {opset}, "local": 1, "custom": 1]>'
    texts = [f'<domain: "local", opset_import: ["": 18, "local": 1]> {f}' for f in functions]
    model = onnx.parser.parse_model(f"{header} g {IO} {{ {body} }} {' '.join(texts)}")
    for name, array in held.items():
        model.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    return ir.from_proto(model)


SCALE = "Scale (a) => (b) { c = Constant<value = float {2.0}>() b = Mul(a, c) }"
LINEAR = "Linear (a, w) => (b) { b = MatMul(a, w) }"
TWICE = "Twice (a, w) => (b) { s = local.Scale(a) b = local.Linear(s, w) }"
ACTIVATION = "Activation (a) => (b) { r = Relu(a) b = Mul(r, r) }"


@pytest.mark.parametrize(
    ("body", "functions", "removed"),
    [
        ("p = MatMul(x, P) s = local.Scale(p) y = MatMul(s, M)", [SCALE], D * D),
        ("p = local.Linear(x, P) y = local.Linear(p, M)", [LINEAR], D * D),
        # each call gets a factor of its own
        ("p = local.Twice(x, P) y = local.Twice(p, M)", [SCALE, LINEAR, TWICE], D * D - 1),
    ],
)
def test_a_function_that_hides_a_stream_is_inlined(body, functions, removed):
    result = folded(calling(body, *functions, P=P, M=M), removed)
    assert not result.model.functions
    assert "MatMul" in operators(result.model)


def test_other_functions_stay_functions():
    model = calling(
        "p = local.Linear(x, P) q = local.Linear(p, M) y = local.Activation(q)",
        LINEAR, ACTIVATION, P=P, M=M,
    )  # fmt: skip
    result = folded(model, removed=D * D)
    assert operators(result.model) == ["MatMul", "Activation"]
    assert [function.name for function in result.model.functions.values()] == ["Activation"]


@pytest.mark.parametrize(
    "body",
    [
        "p = local.Linear(x, P) r = Relu(p) y = local.Linear(r, M)",
        "p = MatMul(x, P) a = local.Activation(p) y = MatMul(a, M)",
    ],
)
def test_functions_stay_if_nothing_folds(body):
    refused(calling(body, LINEAR, ACTIVATION, P=P, M=M))


def test_a_function_with_a_matrix_of_its_own_stays():
    held = "Own (a) => (b) { w = Constant<value = float[4, 4] {"
    held += ", ".join(map(str, range(16))) + "}>() b = MatMul(a, w) }"
    refused(calling("p = local.Own(x) q = local.Own(p) y = MatMul(q, M)", held, M=M))


def test_a_function_of_another_opset_stays():
    model = calling("p = local.Linear(x, P) y = local.Linear(p, M)", LINEAR, opset=17, P=P, M=M)
    refused(model)


# --- What surrounds the graph --------------------------------------------------------------------


@pytest.mark.parametrize("opset", range(7, onnx.defs.onnx_opset_version() + 1))
def test_every_opset(opset):
    text = f"(float[a, b, {D}] x) => (float[c, {F}] y) {{ h = MatMul(x, P) p = Add(h, b)"
    text += " m = Reshape(p, s) r = Relu(m) k = Gemm(r, Q, b) y = Gemm<transB = 1>(k, N, c) }"
    held = {"b": normal(D), "Q": square(D), "N": normal(F, D), "c": normal(F)}
    model = graph(text, opset, P=P, s=np.array([-1, D]), **held)
    result = folded(model, removed=D * D)
    assert result.model.opset_imports == {"": opset}


@pytest.mark.parametrize("version", range(6, onnx.IR_VERSION + 1))
def test_every_ir_version(version):
    model = graph(f"{IO} {{ {PAIR} }}", P=P, M=M)
    model.ir_version = version
    assert folded(model, removed=D * D).model.ir_version == version


def annotated() -> onnx.ModelProto:
    """A model that carries everything that no operator reads."""
    text = f"(float[batch, seq, {D}] x) => (float[batch, seq, {F}] y, float[batch, seq, {D}] z)"
    text += f" <float[batch, seq, {D}] p, float[batch, seq, {D}] r>"
    text += f" {{ {PAIR} r = Relu(x) z = custom.Odd<level = 3>(r) }}"
    model = ir.to_proto(graph(text, P=P, M=M))
    model.opset_import.append(onnx.helper.make_opsetid("custom", 2))
    model.producer_name, model.producer_version, model.domain = "producer", "1.2", "org"
    model.model_version, model.doc_string, model.graph.doc_string = 7, "of model", "of graph"
    onnx.helper.set_model_props(model, {"license": "none"})
    for part in (model.graph, model.graph.node[1], model.graph.node[2], model.graph.input[0]):
        part.doc_string = "documented"
        part.metadata_props.add(key="key", value="value")
    model.graph.input[0].type.denotation = "EMBEDDING"
    model.graph.initializer.append(
        onnx.helper.make_tensor("labels", onnx.TensorProto.STRING, [2], [b"a", b"b"])
    )
    return model


def test_everything_else_is_kept():
    expected = annotated()
    result = fold(expected)
    assert result.report.saving.weights == D * D
    after = ir.to_proto(result.ir)
    del expected.graph.node[0]
    expected.graph.node[0].input[0] = "x"  # what P read
    for part in (expected.graph, after.graph):
        assert "labels" in {tensor.name for tensor in part.initializer}
        del part.initializer[:]
        kept = [info for info in part.value_info if info.name == "r"]
        part.ClearField("value_info")
        part.value_info.extend(kept)
    assert str(after) == str(expected)


def test_symbolic_dimensions_are_kept():
    result = fold(annotated())
    assert [str(value.shape) for value in result.ir.graph.inputs] == [f"[batch,seq,{D}]"]
    assert str(result.ir.graph.outputs[0].shape) == f"[batch,seq,{F}]"
    (relu,) = [node for node in result.ir.graph if node.op_type == "Relu"]
    assert str(relu.outputs[0].shape) == f"[batch,seq,{D}]"


def test_names_that_collide_and_nodes_without_a_name():
    text = f"(float[n, {D}] x) => (float[n, 2] y, float[n, 2] u)"
    text += "{ h = MatMul(x, P) p = Add(h, b) q = MatMul(p, M) M_folded = Relu(q)"
    text += " q_bias = Abs(M_folded) y = Add(q_bias, v) w = MatMul(x, M) u = Neg(w) }"
    model = graph(text, P=P, M=normal(D, 2), b=normal(D), v=normal(1))
    result = folded(model, removed=D * D + D - 2 * D - 2)
    every = [v.name for node in result.model.graph for v in node.outputs]
    assert len(set(every)) == len(every)
    assert not set(every) & names(result.model)


def test_stale_value_info_does_not_survive_a_change_of_width():
    text = f"{IO} <float[n, 9] p, float[n, 9] m> {{ p = MatMul(x, P) m = Neg(p) y = MatMul(m, M) }}"
    model = graph(text, P=normal(D, 9), M=normal(9, F))
    result = folded(model, removed=9 * (D + F) - D * F)
    (neg,) = [node for node in result.model.graph if node.op_type == "Neg"]
    assert str(neg.outputs[0].shape) == f"[n,{D}]"


def test_sparse_initializers_are_refused_before_they_are_lost():
    model = annotated()
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "S")
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "S_indices")
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=[D])
    inner = onnx.helper.make_graph([], "inner", [], [], sparse_initializer=[sparse])
    model.graph.node[2].attribute.append(onnx.helper.make_attribute("body", inner))
    with pytest.raises(InvalidModelError, match="holds sparse initializers, which onnx-fold would"):
        fold(model)


def test_training_information_is_refused_before_it_is_lost():
    model = annotated()
    model.training_info.add()
    with pytest.raises(InvalidModelError, match="holds training information, which"):
        fold(model)


def test_a_file_in_which_nothing_folds_is_copied_byte_for_byte(tmp_path):
    model = annotated()
    model.graph.node[0].op_type = "Add"
    model.graph.node[0].input[1] = "x"
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString() + b"\xf8\x3f\x01")  # unknown field
    onnx_fold.fold(tmp_path / "a.onnx", verify=False).save(tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()


# --- Old files ------------------------------------------------------------------------------------


def old(body: str = "p = MatMul(x, P) y = MatMul(p, M)") -> onnx.ModelProto:
    """A file of IR version 3, which lists all initializers among the inputs."""
    held = {"P": normal(D, D), "M": normal(D, F, seed=1)}
    model = ir.to_proto(graph(f"(float[n, {D}] x) => (float[n, {F}] y) {{ {body} }}", 8, **held))
    model.ir_version = 3
    for tensor in model.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    onnx.checker.check_model(model)
    return model


def test_initializers_that_an_old_file_lists_among_its_inputs(tmp_path):
    model = old()
    result = onnx_fold.fold(model, output=tmp_path / "f.onnx")
    assert result.report.saving.weights == D * D
    assert result.report.verification.ok
    assert onnx_fold.verify(model, tmp_path / "f.onnx")
    written = onnx.load(tmp_path / "f.onnx")
    onnx.checker.check_model(written)
    assert [value.name for value in written.graph.input] == ["x"]
    names = {value.name for value in model.graph.input}
    assert names == {"x", "P", "M"}, "the source was changed"


def test_an_old_file_in_which_nothing_folds_stays(tmp_path):
    onnx.save(old("p = MatMul(x, P) q = Exp(p) y = MatMul(q, M)"), tmp_path / "m.onnx")
    onnx_fold.fold(tmp_path / "m.onnx", output=tmp_path / "f.onnx")
    assert (tmp_path / "f.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()
    model = onnx.load(tmp_path / "m.onnx")
    assert onnx_fold.fold(model).model == ir.to_proto(ir.from_proto(model))


def test_initializers_that_a_caller_can_override_are_named(tmp_path):
    """As the same list means from IR version 4 on, also behind a Transpose."""
    model = old("t = Transpose(P) p = MatMul(x, t) y = MatMul(p, M)")
    model.ir_version = 4
    result = onnx_fold.fold(model)
    assert not result.report.folded
    report = result.report
    assert report.given == []
    assert len(report.overridable) == len(report.to_dict()["overridable"]) == 2
    text = str(report)
    assert text.startswith("Nothing folds: a caller can override the weights of its layers.")
    assert "2 layers" in text
    assert "remove_initializer_from_input" in text

"""Weights written by independent jobs: in threads, processes and a Dask cluster; what they hold."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import assert_same_function, assert_whole, externalise, graph, normal, outputs

import onnx_fold
from onnx_fold import pipeline
from onnx_fold.algebra import expression
from onnx_fold.errors import CannotWriteError
from onnx_fold.files import write
from onnx_fold.files.load import external_tensors, load
from onnx_fold.report.fold import CheckFailedError

D = 32


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def skipless(layers: int = 3, dtype=np.float32) -> ir.Model:
    """Layers of a projection into an MLP, and a part that does not fold."""
    weights = {"S": normal(D, D, seed=99, dtype=dtype)}
    body = "x0 = Relu(x) "
    for i in range(layers):
        body += f"p{i} = MatMul(x{i}, P{i}) m{i} = MatMul(p{i}, M{i}) x{i + 1} = Relu(m{i}) "
        weights[f"P{i}"] = normal(D, D, seed=2 * i, dtype=dtype)
        weights[f"M{i}"] = normal(D, D, seed=2 * i + 1, dtype=dtype)
    kind = {"float32": "float", "float16": "float16"}[np.dtype(dtype).name]
    text = f"({kind}[n, {D}] x) => ({kind}[n, {D}] y) {{ {body} y = MatMul(x{layers}, S) }}"
    return graph(text, **weights)


def external(name: str = "m.onnx", data: str = "w.bin", **options) -> Path:
    ir.save(skipless(**options), name, external_data=data, size_threshold_bytes=0)
    return Path(name)


def assert_written(name: str = "f.onnx") -> None:
    assert_same_function(ir.load("m.onnx"), ir.load(name))
    report = onnx_fold.verify("m.onnx", name)
    assert report.ok, report.reason


# --- Executors ------------------------------------------------------------------------------------


@pytest.fixture(params=["own threads", "threads", "processes", "dask"])
def executor(request):
    if request.param == "own threads":
        yield None
    elif request.param == "threads":
        with ThreadPoolExecutor(3) as pool:
            yield pool
    elif request.param == "processes":
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool
    else:
        distributed = pytest.importorskip("distributed")
        options = {"n_workers": 1, "processes": False, "dashboard_address": None}
        with distributed.Client(**options) as client, client.get_executor() as pool:
            yield pool


@pytest.mark.filterwarnings("default::ResourceWarning", "default::DeprecationWarning")
def test_any_executor(executor):
    external()
    result = onnx_fold.fold("m.onnx", output="f.onnx", executor=executor)
    assert len(result.report.folded) == 3
    assert result.report.verification.ok
    assert {path.name for path in Path().iterdir()} == {"m.onnx", "w.bin", "f.onnx", "f.onnx.data"}
    assert_written()
    result.save("g.onnx", executor=executor, shard_size=2 * 4 * D * D)
    assert_written("g.onnx")


def test_a_worker_that_dies():
    external()
    result = onnx_fold.fold("m.onnx", verify=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        os.kill(pool.submit(os.getpid).result(), 9)
        with pytest.raises(CannotWriteError, match="a worker process died"):
            result.save("f.onnx", executor=pool)
    assert {path.name for path in Path().iterdir()} == {"m.onnx", "w.bin"}


def test_jobs_that_have_not_begun_are_cancelled(monkeypatch):
    external(layers=10)
    ran = []

    def fail(job, *_):
        ran.append(job.name)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(write.Job, "run", fail)
    with pytest.raises(CannotWriteError, match="Input/output error"), ThreadPoolExecutor(1) as pool:
        onnx_fold.fold("m.onnx", output="f.onnx", executor=pool)
    assert 1 <= len(ran) <= 3
    assert {path.name for path in Path().iterdir()} == {"m.onnx", "w.bin"}


def test_ctrl_c_between_jobs():
    external()

    def interrupt(what, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        onnx_fold.fold("m.onnx", output="f.onnx", progress=interrupt)
    assert {path.name for path in Path().iterdir()} == {"m.onnx", "w.bin"}


# --- What is evaluated, and when ------------------------------------------------------------------


@pytest.fixture
def evaluations(monkeypatch):
    """Counts evaluations of folded weights, and how many of them were alive at once."""
    counts = {"evaluated": 0, "at once": 0, "most at once": 0}
    evaluated, lock = expression.FoldedTensor.evaluated, threading.Lock()

    def counted(self, *args):
        with lock:
            counts["evaluated"] += 1
            counts["at once"] += 1
            counts["most at once"] = max(counts["at once"], counts["most at once"])
        try:
            return evaluated(self, *args)
        finally:
            with lock:
                counts["at once"] -= 1

    monkeypatch.setattr(expression.FoldedTensor, "evaluated", counted)
    return counts


def planned(evaluations) -> int:
    """Evaluations that the decision takes, without writing anything."""
    onnx_fold.fold("m.onnx", verify=False)
    count = evaluations["evaluated"]
    evaluations["evaluated"] = 0
    return count


@pytest.mark.parametrize("output", [None, "f.onnx"])
@pytest.mark.parametrize("limit", [0, 2**28], ids=["spooled", "in memory"])
def test_a_weight_is_evaluated_once_to_be_verified_and_written(
    evaluations, monkeypatch, output, limit
):
    monkeypatch.setattr(write, "MEMORY_LIMIT", limit)
    external()
    before = planned(evaluations)
    result = onnx_fold.fold("m.onnx", output=output)
    result.save("g.onnx")
    assert evaluations["evaluated"] - before == 3
    assert evaluations["most at once"] == 1
    assert_written("g.onnx")
    if output:
        assert_written()


def test_nothing_is_evaluated_without_need(evaluations):
    external()
    before = planned(evaluations)
    result = onnx_fold.fold("m.onnx", verify=False)
    assert evaluations["evaluated"] == before
    assert sum(value.const_value.nbytes for value in result.model.graph.initializers.values())
    assert evaluations["evaluated"] == before


def test_a_spooled_result_needs_no_files(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spool")
    monkeypatch.setattr(write, "MEMORY_LIMIT", 0)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    external()
    result = onnx_fold.fold("m.onnx")
    assert not list(folder.iterdir())
    assert_same_function(ir.load("m.onnx"), result.model)


def test_unchanged_weights_are_copied_and_never_read(monkeypatch):
    external()

    def read(self):
        raise AssertionError("was read")

    model = load("m.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(ir.ExternalTensor, "numpy", read)
        patch.setattr(ir.ExternalTensor, "tobytes", read)
        with write.saving(model, Path("f.onnx")):
            pass
    for name, value in load("f.onnx").graph.initializers.items():
        expected = model.graph.initializers[name].const_value.numpy()
        np.testing.assert_array_equal(value.const_value.numpy(), expected)


def test_a_copy_where_the_kernel_cannot(monkeypatch):
    external()

    def cannot(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", cannot)
    onnx_fold.fold("m.onnx", output="f.onnx")
    assert_written()


def test_a_weight_that_overflows_when_it_is_written(monkeypatch):
    external(dtype=np.float16)
    fold_streams = pipeline.fold_streams
    for options in ({"verify": False, "output": "f.onnx"}, {"strict": True}):
        with monkeypatch.context() as patch:

            def overlooked(*arguments, patch=patch):
                streams = fold_streams(*arguments)
                infinite = np.full((D, D), np.inf, np.float16)
                patch.setattr(expression, "evaluate", lambda *_: infinite)
                return streams

            patch.setattr(pipeline, "fold_streams", overlooked)
            with pytest.raises(CheckFailedError, match=r"'M\d' is not finite in float16") as error:
                onnx_fold.fold("m.onnx", **options)
        assert len(error.value.report.folded) == 3
    assert {path.name for path in Path().iterdir()} == {"m.onnx", "w.bin"}


# --- The files ------------------------------------------------------------------------------------


def layout(name: str) -> list[tuple[str, int, int]]:
    tensors = external_tensors(load(name))
    return sorted((str(t.location), t.offset, t.offset + t.length) for t in tensors)


def test_ranges_are_aligned_and_fill_the_file():
    external()
    onnx_fold.fold("m.onnx", output="f.onnx")
    end = 0
    for location, start, stop in layout("f.onnx"):
        assert location == "f.onnx.data"
        assert start % 64 == 0
        assert end <= start < end + 64
        end = stop
    assert Path("f.onnx.data").stat().st_size == end
    assert write._layout([100_000, 100_000], None) == [(0, 0), (0, 102_400)]


def test_shards():
    external()
    size = 3 * 4 * D * D
    onnx_fold.fold("m.onnx", output="f.onnx", shard_size=size)
    shards = sorted(path.name for path in Path().glob("f.onnx-*"))
    assert shards == [f"f.onnx-0000{i}-of-00002.data" for i in (1, 2)]
    assert all(Path(shard).stat().st_size <= size for shard in shards)
    assert_written()
    onnx_fold.fold("m.onnx", output="g.onnx", shard_size=1)  # each weight is larger than that
    assert len(list(Path().glob("g.onnx-*"))) == 4


def test_weights_that_share_bytes_share_them_afterwards():
    text = f"(float[n, {D}] x) => (float[n, {D}] y) {{ a = MatMul(x, A) r = Relu(a) y = MatMul(r, B) }}"  # noqa: E501
    shared = normal(D, D)
    ir.save(graph(text, A=shared, B=shared), "m.onnx", external_data="w.bin")
    proto = onnx.load("m.onnx", load_external_data=False)
    first, second = proto.graph.initializer
    second.external_data.clear()
    second.external_data.extend(first.external_data)
    onnx.save(proto, "m.onnx")
    Path("w.bin").write_bytes(Path("w.bin").read_bytes()[: 4 * D * D])
    onnx_fold.fold("m.onnx", output="f.onnx")
    assert Path("f.onnx.data").stat().st_size == 4 * D * D
    assert_same_function(ir.load("m.onnx"), ir.load("f.onnx"))


def test_several_data_files():
    external()
    model = load("m.onnx")
    with write.saving(model, Path("s.onnx"), shard_size=4 * D * D):
        pass
    assert len(list(Path().glob("s.onnx-*"))) == 7
    onnx_fold.fold("s.onnx", output="f.onnx")
    assert_written()


def test_types_of_every_width_and_small_tensors():
    arrays = {
        "half": np.arange(300, dtype=np.float16),
        "byte": np.arange(300).astype(np.int8),
        "flag": np.arange(300) % 3 == 0,
        "small": np.arange(3.0),
        "empty": np.zeros((0, 300), np.float32),
    }
    tensors = {name: ir.tensor(array, name=name) for name, array in arrays.items()}
    for dtype in (ir.DataType.INT4, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN):
        array = (np.arange(1001) % 7).astype(dtype.numpy())
        tensors[dtype.name] = ir.Tensor(array, dtype, name=dtype.name)
    tensors["text"] = ir.StringTensor([b"a" * 300], shape=ir.Shape([1]), name="text")
    values = [ir.Value(name=name, const_value=tensor) for name, tensor in tensors.items()]
    held = ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 21})
    with write.saving(ir.Model(held, ir_version=10), Path("f.onnx"), shard_size=2**20):
        pass
    read = load("f.onnx").graph.initializers
    outside = {"half", "byte", "flag", "INT4", "BFLOAT16", "FLOAT8E4M3FN"}
    for name, tensor in tensors.items():
        found = read[name].const_value
        assert isinstance(found, ir.ExternalTensor) == (name in outside)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(found.numpy(), tensor.numpy())


def test_bodies_and_constants_that_lie_in_files():
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]> g (float[n, {D}] x, bool c) => (float[n, {D}] y)'
        " { k = Constant<value = float[1] {1}>() s = Add(x, k)"
        f" y = If(c) <then_branch = t () => (float[n, {D}] a) {{ a = MatMul(s, W) }},"
        f" else_branch = e () => (float[n, {D}] b) {{ b = Neg(s) }}> }}"
    )
    weight = onnx.numpy_helper.from_array(normal(D, D), "W")
    model.graph.node[2].attribute[0].g.initializer.append(weight)
    constant = onnx.numpy_helper.from_array(normal(1, D), "k")
    model.graph.node[0].attribute[0].t.CopyFrom(constant)
    original = ir.from_proto(onnx.ModelProto.FromString(model.SerializeToString()))
    onnx.save(model, "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0,
              convert_attribute=True)  # fmt: skip
    onnx_fold.fold("m.onnx", output="out.onnx")
    Path("w.bin").unlink()
    assert Path("out.onnx.data").stat().st_size == 4 * D * D
    assert_same_function(original, ir.load("out.onnx"))


# --- Whatever is written is whole by itself -------------------------------------------------------


def everywhere(dtype=np.float32) -> ir.Model:
    """Small and large tensors: initializers of graphs, bodies, functions; attributes of these."""
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["": 18, "local": 1]>
        g (float[n, {D}] x, bool c) => (float[n, {D}] y) {{
          p = MatMul(x, P) m = MatMul(p, M) r = Relu(m) s = Mul(r, gain)
          k = Constant<value = float[1] {{1}}>() t = Add(s, k)
          h = If(c) <
            then_branch = a () => (float[n, {D}] u) {{ v = Mul(t, inner) u = MatMul(v, W) }},
            else_branch = b () => (float[n, {D}] u) {{ u = Neg(t) }}
          >
          y = local.shift(h)
        }}
        <domain: "local", opset_import: ["": 18]>
        shift (z) => (q) {{
          one = Constant<value = float[1] {{1}}>()
          q = Add(z, one)
        }}
        """
    )
    held = {"P": normal(D, D), "M": normal(D, D, seed=1), "gain": np.float32(0.5)}
    for name, array in held.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    (body,) = (node for node in model.graph.node if node.op_type == "If")
    for name, array in {"W": normal(D, D, seed=2), "inner": np.full(1, 2, np.float32)}.items():
        body.attribute[0].g.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(model)


@pytest.mark.parametrize("shard_size", [None, 4 * D * D])
@pytest.mark.parametrize("place", ["here", "elsewhere", "in place"])
def test_no_tensor_refers_to_a_file_of_the_input(place, shard_size):
    original = everywhere()
    externalise(original, "m.onnx")
    Path("out").mkdir()
    target = {"here": "f.onnx", "elsewhere": "out/f.onnx", "in place": "m.onnx"}[place]
    options = {"in_place": True} if place == "in place" else {"output": target}
    result = onnx_fold.fold("m.onnx", shard_size=shard_size, **options)
    assert len(result.report.folded) == 1
    Path("w.bin").unlink(missing_ok=True)
    data = [".data"] if shard_size is None else [f"-0000{i}-of-00002.data" for i in (1, 2)]
    assert_whole(target, *(Path(target).name + each for each in data))
    inputs = {"x": normal(3, D), "c": np.array(True)}
    expected, found = outputs(original, **inputs)["y"], outputs(Path(target), **inputs)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("only", ["initializer", "attribute"])
def test_a_small_tensor_in_a_file_where_nothing_folds(only):
    signature = f"(float[n, {D}] x) => (float[n, {D}] y)"
    if only == "initializer":
        model = graph(f"{signature} {{ y = Mul(x, g) }}", g=np.float32(3))
    else:
        model = graph(f"{signature} {{ g = Constant<value = float[1] {{3}}>() y = Mul(x, g) }}")
    externalise(model, "m.onnx")
    Path("out").mkdir()
    onnx_fold.fold("m.onnx", output="out/f.onnx")
    assert_whole("out/f.onnx")
    assert_same_function(model, load("out/f.onnx"))

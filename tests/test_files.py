"""Reading a model: where its weights are said to be, and what is refused before they are read."""

import contextlib
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import graph, normal

import onnx_fold
from onnx_fold.errors import InvalidModelError
from onnx_fold.files.load import load

D = 8
SIZE = 4 * D * D


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"(float[n, {D}] x) => (float[n, {D}] y) {{ p = MatMul(x, P) y = MatMul(p, M) }}"
    model = graph(text, P=normal(D, D), M=normal(D, D, seed=1))
    ir.save(model, "m.onnx", external_data="w.bin", size_threshold_bytes=0)


def edit(name: str = "P", **entries: object) -> None:
    """Say that the bytes of an initializer are elsewhere."""
    proto = onnx.load("m.onnx", load_external_data=False)
    (tensor,) = (each for each in proto.graph.initializer if each.name == name)
    for entry in list(tensor.external_data):
        if entry.key in entries:
            tensor.external_data.remove(entry)
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    Path("m.onnx").write_bytes(proto.SerializeToString())


def refusal() -> str:
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    with pytest.raises(InvalidModelError) as error:
        onnx_fold.fold("m.onnx", output="f.onnx")
    after = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert after == before
    assert str(error.value).startswith("m.onnx: ")
    return str(error.value)


@pytest.mark.parametrize("what", ["offset", "length"])
@pytest.mark.parametrize(
    "value", ["-4", "four", "0x10", "1e3", "", " 4", "4\n", "4.0", "٤", str(2**70), "1" * 5000]
)
def test_numbers_that_are_none(what, value):
    edit(**{what: value})
    assert f"initializer 'P' has an invalid {what}: {value!r}" in refusal()


@pytest.mark.parametrize("offset", [2 * SIZE, 2**40, 10**17])
def test_an_offset_past_the_end(offset):
    edit(offset=offset)
    assert "w.bin is too short for initializer 'P'" in refusal()


@pytest.mark.parametrize("length", [0, SIZE - 1, SIZE + 1])
def test_a_length_that_is_not_the_tensors(length):
    edit(length=length)
    assert f"'P' takes {SIZE} bytes, but has {length} in w.bin" in refusal()


def test_ranges_that_overlap():
    Path("w.bin").write_bytes(Path("w.bin").read_bytes() + bytes(SIZE))
    for name, offset in (("P", 0), ("M", SIZE - 4)):
        edit(name, offset=offset)
    assert "initializers 'P' and 'M' overlap in external data file w.bin" in refusal()


def test_the_same_range_is_shared():
    edit("M", offset=0)
    edit("P", offset=0)
    result = onnx_fold.fold("m.onnx")
    assert result.report.folded


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../w.bin", "points outside the model's folder, to ../w.bin"),
        ("sub/../../w.bin", "points outside the model's folder"),
        ("/etc/hostname", "points outside the model's folder"),
        ("", "is missing"),
        (".", "is missing"),
        ("nothing", "external data file nothing is missing (initializer 'P')"),
        ("w\0.bin", "has no valid location"),
        ("m.onnx/w.bin", "is missing"),
    ],
)
def test_locations(location, message):
    edit(location=location)
    assert message in refusal()


def test_an_absolute_location_inside_the_folder(tmp_path):
    edit(location=tmp_path.resolve() / "w.bin")
    assert "'P' has an absolute location" in refusal()


def test_links():
    shutil.move("w.bin", "real.bin")
    Path("w.bin").symlink_to("real.bin")
    assert onnx_fold.fold("m.onnx").report.folded
    Path("w.bin").unlink()
    Path("w.bin").symlink_to("/etc/hostname")
    assert "points outside the model's folder" in refusal()
    Path("w.bin").unlink()
    os.link("real.bin", "w.bin")
    assert "has several hard links" in refusal()


def test_a_linked_model_reads_the_data_beside_the_link():
    Path("other").mkdir()
    Path("other/m.onnx").symlink_to("../m.onnx")
    with pytest.raises(InvalidModelError, match=r"w\.bin is missing"):
        load("other/m.onnx")


def test_bodies_and_attributes_are_checked_too():
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]> g (float[n, {D}] x) => (float[n, {D}] y)'
        " { k = Constant<value = float[1] {1}>() y = Add(x, k) }"
    )
    tensor = proto.graph.node[0].attribute[0].t
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    Path("m.onnx").write_bytes(proto.SerializeToString())
    assert "points outside the model's folder" in refusal()


def test_a_type_that_has_no_bytes():
    proto = onnx.load("m.onnx", load_external_data=False)
    proto.graph.initializer[0].data_type = onnx.TensorProto.STRING
    Path("m.onnx").write_bytes(proto.SerializeToString())
    assert "'P' is of a type that has no external data" in refusal()


def test_random_bytes_in_the_description_never_crash():
    """Whatever stands in the external data of a tensor: it is read, or refused with a reason."""
    generator = np.random.default_rng(0)
    texts = [
        "0",
        "-1",
        "w.bin",
        "..",
        str(2**63),
        "1" * 30,
        "\n",
        "w.bin/",
        struct.pack("d", 1).hex(),
    ]
    for _ in range(100):
        keys = generator.choice(["location", "offset", "length", "checksum"], 2, replace=False)
        edit(**{str(key): texts[generator.integers(len(texts))] for key in keys})
        with contextlib.suppress(InvalidModelError):
            load("m.onnx")

"""Inputs from files: what does not fit the model is refused before it is read."""

import contextlib
import os
import resource
import zipfile

import numpy as np
import pytest
from helpers import graph, normal

import onnx_fold
from onnx_fold.errors import InvalidModelError, UsageError
from onnx_fold.runtime import npz
from onnx_fold.runtime.inputs import given_inputs

GIB = 2**30


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model(sizes: str = "n, 4"):
    text = f"(float[{sizes}] x) => (float[n, 4] y) {{ p = MatMul(x, P) y = MatMul(p, M) }}"
    return graph(text, P=normal(4, 4), M=normal(4, 4, seed=1))


def refusal(path: str = "i.npz", **options) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError) as error:
        given_inputs(model(**options), path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16, "memory, in KiB"
    assert "\n" not in str(error.value)
    return str(error.value)


def declared(shape, name: str = "x", zeros: int = 0) -> None:
    """A file whose array says that it has ``shape``, followed by so many zeros."""
    with (
        zipfile.ZipFile("i.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w", force_zip64=True) as file,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(zeros // 2**20):
            file.write(bytes(2**20))


def test_arrays_that_fit():
    array = normal(3, 4)
    np.savez_compressed("i.npz", x=array)
    np.testing.assert_array_equal(given_inputs(model(), "i.npz")["x"], array)


def test_an_array_that_says_more_than_it_has():
    declared((10**10, 4))
    assert refusal() == (
        "cannot read inputs from i.npz: 'x' has fewer bytes than its shape [10000000000, 4] takes"
    )


def test_an_array_that_has_more_than_the_model_takes():
    declared((2**24, 4), zeros=2**28)
    assert refusal(sizes="2, 4") == "input 'x' is [2,4], not [16777216, 4]"
    assert refusal(sizes="n, 4, 4") == "input 'x' has rank 3, not 2"


def test_an_array_that_the_model_does_not_take():
    declared((2**24, 4), name="z", zeros=2**28)
    assert refusal() == "unknown input 'z': the model takes x"


@pytest.mark.parametrize("shape", [(2**24, 4), (1, 4)])
def test_an_array_that_does_not_fit_in_memory(monkeypatch, shape):
    declared(shape, zeros=2**28)
    monkeypatch.setattr(npz, "available_memory", lambda: GIB)
    assert refusal() == "cannot read inputs from i.npz: 268.4 MB of arrays do not fit in memory"


def test_python_objects():
    np.savez("i.npz", x=np.array([[{}, "a"]], object))
    assert "'x' holds Python objects, not numbers" in refusal()


@pytest.mark.parametrize("data", [b"", b"x", b"PK\x03\x04", b"\x93NUMPY\x01\x00v\x00{"])
def test_other_files(data):
    with open("i.npz", "wb") as file:  # noqa: PTH123
        file.write(data)
    assert refusal() == "cannot read inputs from i.npz: File is not a zip file"


def test_other_archives():
    with zipfile.ZipFile("i.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "'readme.txt' in it is no array" in refusal()
    with zipfile.ZipFile("i.npz", "w") as archive:
        archive.writestr("x.npy", "hello")
    assert refusal().startswith("cannot read inputs from i.npz: ")


def test_damaged_archives():
    np.savez_compressed("i.npz", x=normal(3, 4))
    with open("i.npz", "rb") as file:  # noqa: PTH123
        data = file.read()
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 3):
            damaged[place] ^= int(generator.integers(1, 256))
        with open("i.npz", "wb") as file:  # noqa: PTH123
            file.write(damaged)
        with contextlib.suppress(UsageError):
            given_inputs(model(), "i.npz")


def test_pipes_and_devices_do_not_block():
    os.mkfifo("pipe")
    for path, reason in (
        ("pipe", "it is not a regular file"),
        ("/dev/zero", "it is not a regular file"),
        (".", "Is a directory"),
        ("nothing", "No such file or directory"),
        ("no\0thing", "embedded null byte"),
    ):
        shown = path.replace("\0", "\\x00")
        assert refusal(path) == f"cannot read inputs from {shown}: {reason}"
        with pytest.raises(InvalidModelError) as error:
            onnx_fold.inspect(path)
        assert str(error.value).startswith(f"cannot read {shown}: {reason}")

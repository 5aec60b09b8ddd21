"""Damaged files, and what the command line makes of them.

A mutant is a valid model of which some bytes were flipped, or some fields of its protobuf message
changed: sizes, types, names, attributes, opsets, what nodes read and write, where data lies. Every
mutant must end with an exit code: done, or a sentence that says what is wrong. ::

    python tests/mutate.py 10000

runs so many of them in processes of their own, so that a crash of native code or a mutant that
never ends is counted and not fatal.
"""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from helpers import graph, normal

from onnx_fold import cli
from onnx_fold.errors import OnnxFoldError

WIDTH = 8
SECONDS = 120
"""After which a mutant counts as one that never ends."""

MEMORY = 12 * 2**30
"""Address space of a process, in bytes; ONNX and its runtime take a good part of it."""

INTEGERS = (-(2**63), -(2**31), -3, -2, -1, 0, 1, 2, 3, 7, 16, 255, 2**31, 2**62, 2**63 - 1)
STRINGS = (
    "",
    "x",
    "P",
    "y",
    "ai.onnx",
    "com.microsoft",
    "\0",
    "../x",
    "n" * 300,
    "MatMul",
    "é",
    "0",
)


# Models ------------------------------------------------------------------------------------------


def weights(*names: str) -> dict[str, np.ndarray]:
    return {name: normal(WIDTH, WIDTH, seed=seed) for seed, name in enumerate(names)}


def layers() -> onnx.ModelProto:
    """Linear layers with biases, gains, a norm and an activation between them."""
    text = (
        "(float[batch, seq, 8] x) => (float[batch, seq, 8] y) { h0 = MatMul(x, P)"
        " h1 = Add(h0, b) h2 = Mul(h1, g) h3 = MatMul(h2, M) h4 = Relu(h3) h5 = MatMul(h4, Q)"
        " h6 = Reshape<allowzero = 0>(h5, shape) h7 = Transpose<perm = [0, 1, 2]>(h6)"
        " h8 = MatMul(h7, R) h9 = LayerNormalization<axis = -1, epsilon = 0.00001>(h8, g)"
        " hA = MatMul(h9, S) y = Softmax<axis = -1>(hA) }"
    )
    extra = {"b": normal(8), "g": normal(8, seed=1), "shape": np.array([0, 0, 8])}
    return ir.to_proto(graph(text, **weights("P", "M", "Q", "R", "S"), **extra))


def attention() -> onnx.ModelProto:
    """A block without skips: an embedding, four heads, an FFN, and an ordinary head."""
    text = (
        "(int64[batch, seq] input_ids) => (float[batch, seq, 8] logits) {"
        " h = Gather(E, input_ids) q = MatMul(h, Q) k = MatMul(h, K) v = MatMul(h, V)"
        " q4 = Reshape(q, heads) k4 = Reshape(k, heads) v4 = Reshape(v, heads)"
        " qt = Transpose<perm = [0, 2, 1, 3]>(q4) kt = Transpose<perm = [0, 2, 3, 1]>(k4)"
        " vt = Transpose<perm = [0, 2, 1, 3]>(v4) s = MatMul(qt, kt) a = Softmax<axis = -1>(s)"
        " o = MatMul(a, vt) ot = Transpose<perm = [0, 2, 1, 3]>(o) o3 = Reshape(ot, flat)"
        " p = MatMul(o3, P) up = MatMul(p, M) gate = MatMul(p, G) act = Sigmoid(gate)"
        " f = Mul(up, act) out = MatMul(f, O) logits = MatMul(out, L) }"
    )
    shapes = {"heads": np.array([0, 0, 4, 2]), "flat": np.array([0, 0, 8])}
    return ir.to_proto(graph(text, **weights(*"EQKVPMGOL"), **shapes))


def body() -> onnx.ModelProto:
    """A stream that runs past control flow, and a stream within it."""
    text = (
        "(float[n, 8] x, bool c) => (float[n, 8] y) { p = MatMul(x, P) q = MatMul(p, M)"
        " z = If(c) <then_branch = a () => (float[n, 8] t) { s = MatMul(q, R) t = Neg(s) },"
        " else_branch = b () => (float[n, 8] e) { e = Add(q, k) }> y = MatMul(z, Q) }"
    )
    return ir.to_proto(graph(text, **weights("P", "M", "Q", "R"), k=normal(8)))


def function() -> onnx.ModelProto:
    """A function that hides a stream, with an attribute that it hands on."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18, "local": 1]>'
        " g (float[n, 8] x) => (float[n, 8] y) { p = local.f<a = 1>(x, P) y = MatMul(p, M) }"
        ' <domain: "local", opset_import: ["": 18]> f <a> (v, w) => (r)'
        " { s = Identity(v) t = MatMul(s, w) r = Softmax<axis: int = @a>(t) }"
    )
    for name, array in weights("P", "M").items():
        model.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    model.metadata_props.add(key="pkg.torch", value="{'a': [1, 2]}")
    for node in model.graph.node:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'layers.0']")
    return model


def half() -> onnx.ModelProto:
    """Float16 with an island of float32."""
    text = (
        "(float16[n, 8] x) => (float16[n, 8] y) { p = MatMul(x, P) w = Cast<to = 1>(p)"
        " n = Cast<to = 10>(w) y = Gemm<transB = 1, alpha = 0.5>(n, M) }"
    )
    arrays = weights("P", "M").items()
    return ir.to_proto(graph(text, **{name: array.astype(np.float16) for name, array in arrays}))


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    each.__name__: each for each in (layers, attention, body, function, half)
}


@cache
def source(name: str) -> onnx.ModelProto:
    return MODELS[name]()


# Mutations ---------------------------------------------------------------------------------------


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """1 to 9 bytes become others; or the end is missing."""
    damaged = bytearray(data)
    if rng.random() < 0.1:
        return bytes(damaged[: rng.integers(len(damaged))])
    for place in rng.integers(0, len(damaged), rng.integers(1, 10)):
        damaged[place] ^= int(rng.integers(1, 256))
    return bytes(damaged)


def changed(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """One field, drawn by its kind and then by its place, gets another value."""
    places: dict[str, list[tuple[Message, FieldDescriptor]]] = {}
    for message in _messages(model):
        for field in message.DESCRIPTOR.fields:
            if field.is_repeated or message.HasField(field.name) or rng.random() < 0.02:
                places.setdefault(field.full_name, []).append((message, field))
    kind = sorted(places)[rng.integers(len(places))]
    message, field = places[kind][rng.integers(len(places[kind]))]
    change = _change_list if field.is_repeated else _change_one
    with contextlib.suppress(ValueError, TypeError):  # what protobuf itself refuses to hold
        change(model, message, field, rng)


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for each in value if field.is_repeated else [value]:
                yield from _messages(each)


def _change_list(
    model: Message, message: Message, field: FieldDescriptor, rng: np.random.Generator
) -> None:
    items = getattr(message, field.name)
    action = rng.integers(5)
    place = int(rng.integers(len(items))) if len(items) else 0
    is_message = field.type == FieldDescriptor.TYPE_MESSAGE
    if not len(items) or action == 0:
        if is_message:
            items.add().CopyFrom(_other(model, field, rng))
        else:
            items.append(_value(model, field, rng))
    elif action == 1:
        del items[place]
    elif action == 2:
        items.extend([items[place]])
    elif action == 3:
        order = [items[i] for i in rng.permutation(len(items))]
        copies = [copy.deepcopy(each) for each in order]
        del items[:]
        items.extend(copies)
    elif is_message:
        items[place].CopyFrom(_other(model, field, rng))
    else:
        items[place] = _value(model, field, rng)


def _change_one(
    model: Message, message: Message, field: FieldDescriptor, rng: np.random.Generator
) -> None:
    if rng.random() < 0.3:
        message.ClearField(field.name)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        getattr(message, field.name).CopyFrom(_other(model, field, rng))
    else:
        setattr(message, field.name, _value(model, field, rng))


def _other(model: Message, field: FieldDescriptor, rng: np.random.Generator) -> Message:
    """Another message of the same kind out of the model, or an empty one."""
    found = [each for each in _messages(model) if each.DESCRIPTOR is field.message_type]
    if not found or rng.random() < 0.1:
        from google.protobuf.message_factory import GetMessageClass

        return GetMessageClass(field.message_type)()
    other = found[rng.integers(len(found))]
    return type(other).FromString(other.SerializeToString())


def _value(model: Message, field: FieldDescriptor, rng: np.random.Generator) -> Any:
    """A value for a field that is no message: at its limits, or that of another field."""
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        same = [
            value
            for message in _messages(model)
            for each, found in message.ListFields()
            if each.cpp_type == kind and each.type == field.type
            for value in (found if each.is_repeated else [found])
        ]
        text = STRINGS[rng.integers(len(STRINGS))]
        pool = [text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text, *same]
        return pool[0 if rng.random() < 0.4 else rng.integers(len(pool))]
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return float(rng.choice([0.0, -1.0, np.nan, np.inf, 1e30, 1e-30]))
    value = int(INTEGERS[rng.integers(len(INTEGERS))])
    small = kind not in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
    return int(rng.integers(-1, 30)) if small else value


def mutant(seed: int, folder: Path) -> str:
    """Write mutant ``seed`` to ``folder``, and what it was made of; return the name of that."""
    rng = np.random.default_rng(seed)
    name = sorted(MODELS)[rng.integers(len(MODELS))]
    external = bool(rng.random() < 0.3)
    model = onnx.ModelProto.FromString(source(name).SerializeToString())
    for file in ("good.onnx", "m.onnx"):
        onnx.save(
            onnx.ModelProto.FromString(model.SerializeToString()), folder / file,
            save_as_external_data=external, location="w.bin", size_threshold=200,
        )  # fmt: skip
        if external and file == "good.onnx":
            (folder / "w.bin").unlink(missing_ok=True)
    path = folder / "m.onnx"
    if rng.random() < 0.25:
        path.write_bytes(flipped(path.read_bytes(), rng))
    else:
        model = onnx.load(path, load_external_data=False)
        for _ in range(rng.integers(1, 4)):
            changed(model, rng)
        path.write_bytes(model.SerializeToString())
    data = folder / "w.bin"
    if data.exists() and rng.random() < 0.2:
        data.write_bytes(flipped(data.read_bytes(), rng))
    return name


# Running -----------------------------------------------------------------------------------------

COMMANDS = {
    "fold": ["fold", "m.onnx", "-o", "f.onnx", "--report", "r.json"],
    "fold unchecked": ["fold", "m.onnx", "-o", "g.onnx", "--no-verify"],
    "inspect": ["inspect", "m.onnx", "--json"],
    "verify": ["verify", "good.onnx", "m.onnx"],
    "verify backwards": ["verify", "m.onnx", "good.onnx"],
}


def result(arguments: list[str]) -> str:
    """The exit code of the program and its sentence; any other exception is the caller's."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli._console.cache_clear()
        try:
            cli.cli(arguments, standalone_mode=False)
        except OnnxFoldError as error:
            return f"{error.exit_code} {error}"
        except click.ClickException as error:
            return f"{error.exit_code} {error.message}"
        except SystemExit as leave:
            return f"{leave.code}"
        except MemoryError:
            return "1 there is not enough memory"
    return "0"


def run_mutant(seed: int, folder: Path) -> dict[str, str]:
    """Run all commands on mutant ``seed`` in an empty ``folder``; return their results."""
    mutant(seed, folder)
    before = (folder / "m.onnx").read_bytes()
    results = {}
    with contextlib.chdir(folder):
        for name, arguments in COMMANDS.items():
            results[name] = said = result(arguments)
            assert said in "01" or (said[2:] and "\n" not in said), "no sentence"
            assert len(said) < 1000, "not one sentence"
            check_outputs(folder, name, results[name])
    assert (folder / "m.onnx").read_bytes() == before, "the input was changed"
    return results


def check_outputs(folder: Path, command: str, result: str) -> None:
    """What was written can be read; what failed wrote nothing."""
    written = folder / {"fold": "f.onnx", "fold unchecked": "g.onnx"}.get(command, "none")
    if command.startswith("fold"):
        assert written.exists() == (result == "0"), "no output, or one of a failed run"
        if written.exists():
            onnx.load(written)


def _work(seeds: list[int], connection: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        try:
            results: Any = run_mutant(seed, folder)
        except BaseException:
            results = traceback.format_exc()
        shutil.rmtree(folder, ignore_errors=True)
        connection.send((seed, results, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def run_all(
    seeds: list[int], tell: Callable[[str], None] = lambda text: None
) -> tuple[Counter[str], dict[int, str], int]:
    """Run ``seeds`` in processes; return the exit codes, the failures, and the peak memory.

    ``tell`` is told of each failure when it is found, and how far the run is.
    """
    codes, failures, peak = Counter[str](), {}, 0
    context = multiprocessing.get_context("fork")
    while seeds:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(seeds, sender))
        process.start()
        sender.close()
        why = ""
        while seeds and not why:
            try:
                if receiver.poll(SECONDS):
                    seed, results, memory = receiver.recv()
                else:
                    why = f"does not end within {SECONDS} s"
                    break
            except EOFError:
                process.join()
                why = f"the process ended with {process.exitcode}"
                break
            seeds, peak = seeds[1:], max(peak, memory)
            if isinstance(results, str):
                failures[seed] = results
                tell(f"--- mutant {seed}\n{results}")
            else:
                codes.update(f"{name}: {text[0]}" for name, text in results.items())
            if len(seeds) % 500 == 0:
                tell(f"{len(seeds)} to go, {len(failures)} failures")
        if why:
            failures[seeds[0]] = why
            tell(f"--- mutant {seeds[0]}\n{why}")
            seeds = seeds[1:]
        process.kill()
        process.join()
    return codes, failures, peak


def main(count: int, start: int = 0) -> int:
    """Run mutants ``start`` to ``start + count`` and print what became of them."""
    codes, failures, peak = run_all(
        list(range(start, start + count)), lambda text: print(text, flush=True)
    )
    for name, times in sorted(codes.items()):
        print(f"{name}: {times}")
    print(f"{count} mutants, {len(failures)} failures, at most {peak // 1024} MiB")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

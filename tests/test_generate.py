"""Greedy decoding: what is fed at each step, and when two models write the same."""

import functools
import json

import numpy as np
import onnx_ir as ir
import pytest
from helpers import fold, model, normal

from onnx_fold import cli
from onnx_fold.check.parity import verify
from onnx_fold.errors import UsageError
from onnx_fold.files.load import load
from onnx_fold.runtime import sessions
from onnx_fold.runtime.generate import Decoder, Decoding, greedy

VOCABULARY = 8


def markov(logits: np.ndarray, name: str = "y") -> ir.Model:
    """A decoder without a cache that looks at one token: ``logits[i]`` come after token i."""
    width = len(logits)
    text = f"m (int64[batch, seq] ids) => (float[batch, seq, {width}] {name})"
    return model(f"{text} {{ {name} = Gather(table, ids) }}", table=logits.astype(np.float32))


def counting() -> np.ndarray:
    """Logits that make a model write 1, 2, 3, ...: the next token has 10, the one after it 9."""
    table = np.zeros((VOCABULARY, VOCABULARY))
    for token in range(VOCABULARY):
        table[token, (token + 1) % VOCABULARY] = 10
        table[token, (token + 2) % VOCABULARY] = 9
    return table


def cached(
    length: str = "past",
    names: str = "past_key present_key",
    encoder: str = "encoder_hidden_states",
    **sizes: str,
) -> ir.Model:
    """A decoder that adds up the embeddings of all tokens, which it keeps in a cache."""
    past, present = names.split()
    batch, seq = sizes.get("batch", "b"), sizes.get("seq", "s")
    return model(
        f"""
        m (int32[{batch}, {seq}] input_ids, int64[b, "past + s"] attention_mask,
           int64[b, s] position_ids, float[b, enc, 4] {encoder},
           float[b, {length}, 4] {past})
            => (float[b, s, {VOCABULARY}] scores, float[b, all, 4] {present})
        {{
            x = Gather(table, input_ids)
            {present} = Concat<axis = 1>({past}, x)
            floats = Cast<to = 1>(attention_mask)
            two = Constant<value_ints = [2]>()
            column = Unsqueeze(floats, two)
            seen = Mul({present}, column)
            one = Constant<value_ints = [1]>()
            sum = ReduceSum(seen, one)
            context = ReduceSum({encoder}, one)
            mixed = Sum(x, sum, context)
            scores = MatMul(mixed, head)
        }}
        """,
        table=normal(VOCABULARY, 4, seed=1),
        head=normal(4, VOCABULARY, seed=2),
    )


def function_of(source):
    return functools.partial(sessions.run, sessions.session(source))


def written(source, start, tokens: int) -> list[int]:
    """What a model writes greedily."""
    decoder = Decoder.of(load(source))
    return [token for token, _ in greedy(decoder, function_of(source), start, tokens)]


# --- What is fed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["encoder_hidden_states", "past_cross_key"])
def test_what_a_decoder_with_a_cache_reads(encoder):
    decoder = Decoder.of(cached(encoder=encoder))
    assert (decoder.token_ids, decoder.logits) == ("input_ids", "scores")
    assert decoder.cache == {"past_key": "present_key"}
    states = np.ones((1, 3, 4), np.float32)
    start = decoder.start({"input_ids": [[5, 6]], encoder: states})
    steps = []

    def function(inputs):
        steps.append(inputs)
        return run(inputs)

    run = function_of(decoder.model)
    assert len(list(greedy(decoder, function, start, 3))) == 3
    assert [step["input_ids"].shape for step in steps] == [(1, 2), (1, 1), (1, 1)]
    assert [step["past_key"].shape[1] for step in steps] == [0, 2, 3]
    assert [step["position_ids"].tolist() for step in steps] == [[[0, 1]], [[2]], [[3]]]
    for step in steps:
        assert step["input_ids"].dtype == np.int32
        total = step["past_key"].shape[1] + step["input_ids"].shape[1]
        assert step["attention_mask"].tolist() == [[1] * total]
        np.testing.assert_array_equal(step[encoder], states)


def test_a_cache_changes_nothing_in_what_is_written():
    decoder = Decoder.of(cached())
    start = decoder.start({"input_ids": [[5, 6]]})
    decoding = Decoding(decoder, function_of(decoder.model), start)
    decoding.read([5, 6])
    decoding.read([1])
    in_steps = decoding.read([3])
    at_once = Decoding(decoder, function_of(decoder.model), start).read([5, 6, 1, 3])
    np.testing.assert_allclose(in_steps, at_once, rtol=1e-5)


def test_without_a_cache_the_whole_sequence_is_read_again():
    decoder = Decoder.of(markov(counting()))
    lengths = []

    def function(inputs):
        lengths.append(inputs["ids"].shape)
        return run(inputs)

    run = function_of(decoder.model)
    tokens = [token for token, _ in greedy(decoder, function, decoder.start({"ids": [[6]]}), 4)]
    assert tokens == [7, 0, 1, 2]
    assert lengths == [(1, 1), (1, 2), (1, 3), (1, 4)]


@pytest.mark.parametrize(
    ("text", "token_ids", "logits"),
    [
        ("(int64[b, s] input_ids) => (float[b, s, 9] h, float[b, s, 8] y)", "input_ids", "y"),
        ("(int64[b, s] ids) => (float[b, 9] pooled, float[b, v] logits)", "ids", "logits"),
        (
            "(int64[b, s] position_ids, int64[b, s] token_type_ids, int32[b, s] ids)"
            " => (float[b, s, 8] y)",
            "ids",
            "y",
        ),
        (
            "(int64[b, s] input_ids, int64[b, t] decoder_input_ids) => (float[b, t, 8] logits)",
            "decoder_input_ids",
            "logits",
        ),
    ],
)  # fmt: skip
def test_which_are_the_tokens_and_the_logits(text, token_ids, logits):
    name = token_ids
    source = model(f"m {text} {{ e = Gather(table, {name}) }}", table=np.zeros((8, 4), np.float32))
    decoder = Decoder.of(source)
    assert (decoder.token_ids, decoder.logits) == (token_ids, logits)


# --- Equal, tied, different ----------------------------------------------------------------------


def test_the_first_difference_and_its_margins():
    folded = counting()
    folded[5, [6, 7]] = 8.5, 9.25
    report = verify(markov(counting()), markov(folded), inputs={"ids": [[0]]}, greedy=20)
    assert all(output.ok for output in report.outputs)  # which have only seen token 0
    assert not report.ok
    found = report.greedy
    assert (found.tokens, found.equal, found.ok, found.position) == (20, False, False, 5)
    assert (found.token_original, found.token_folded) == (6, 7)
    assert (found.margin_original, found.margin_folded) == (1, 0.75)
    size = np.sqrt((100 + 81) / VOCABULARY)  # what is allowed: 8 roundings of a typical logit
    assert found.limit == pytest.approx(4 * np.sqrt(2) * 8 * 2**-24 * size)
    assert report.reason == (
        "greedy decoding: both write the same 5 of 20 tokens, then 6 (ahead by 1) became 7"
        " (ahead by 0.75), more than rounding (1.3e-05)"
    )
    assert json.loads(json.dumps(report.to_dict()))["greedy"]["position"] == 5


ULP = 2.0**-20  # between 8 and 16


@pytest.mark.parametrize(("gain", "ok"), [(ULP, True), (1e-3, False)])
def test_a_tie_passes_if_both_margins_are_within_rounding(gain, ok):
    original, folded = counting(), counting()
    original[5, 7], folded[5, 7] = 10 - ULP, 10 + gain
    report = verify(markov(original), markov(folded), inputs={"ids": [[0]]}, greedy=20)
    assert (report.ok, report.greedy.ok, bool(report.greedy)) == (ok, ok, ok)
    assert (report.greedy.equal, report.greedy.position) == (False, 5)
    assert report.greedy.margin_original == pytest.approx(ULP)
    assert report.greedy.margin_folded == pytest.approx(gain, rel=1e-2)
    assert ("a tie within rounding" if ok else "more than rounding") in str(report.greedy)
    assert verify(markov(original), markov(folded), inputs={"ids": [[0]]}).ok


def test_ties_are_counted_and_what_comes_after_them_is_seen():
    original, folded = counting(), counting()
    original[5, 7], folded[5, 7] = 10 - ULP, 10 + ULP
    report = verify(markov(original), markov(folded), inputs={"ids": [[0]]}, greedy=20)
    assert report.greedy.ties == 2  # the text comes twice to token 5
    assert "18 of 20 places, at 2 there is a tie" in str(report.greedy)
    folded[7, 1] = 10.5
    report = verify(markov(original), markov(folded), inputs={"ids": [[0]]}, greedy=20)
    assert not report.ok
    assert (report.greedy.ties, report.greedy.position) == (1, 7)
    assert "1 of them ties within rounding, then 0" in str(report.greedy)


def test_in_bfloat16_a_clear_difference_is_no_tie():
    """A limit of the norm times the largest logit would let nearly everything pass."""
    kind = ir.DataType.BFLOAT16.numpy()
    original = counting().astype(kind)
    folded = original.copy()
    folded[5, 7] = kind.type(10.25)  # 9 became 10.25
    text = f"m (int64[b, s] ids) => (bfloat16[b, s, {VOCABULARY}] y) {{ y = Gather(table, ids) }}"
    report = verify(
        model(text, table=original), model(text, table=folded), inputs={"ids": [[0]]}, greedy=20
    )
    assert not report.greedy.ok


def test_scores_of_minus_infinity_are_tokens_that_are_never_written():
    original, folded = counting(), counting()
    original[:, 3] = folded[:, 3] = -np.inf
    original[5, 7], folded[5, 7] = 10 - ULP, 10 + ULP
    report = verify(markov(original), markov(folded), inputs={"ids": [[3]]}, greedy=9)
    assert report.ok
    assert report.greedy.position == 2


def test_a_folded_model_that_breaks_down_on_the_way():
    folded = counting()
    folded[5] = np.nan
    report = verify(markov(counting()), markov(folded), inputs={"ids": [[0]]}, greedy=20)
    assert "does not run where the original does: NaN in the logits after 6 tokens" in report.reason


def test_bfloat16_is_emulated():
    rng = np.random.default_rng(0)
    kind = ir.DataType.BFLOAT16.numpy()
    table, p, m, head = (
        rng.standard_normal(shape).astype(kind)
        for shape in ((VOCABULARY, 16), (16, 16), (16, 16), (16, VOCABULARY))
    )
    text = (
        "m (int64[b, s] ids, bfloat16[b, p, 16] past) => (bfloat16[b, s, 8] logits,"
        " bfloat16[b, t, 16] present) { x = Gather(table, ids) present = Concat<axis = 1>(past, x)"
        " one = Constant<value_ints = [1]>() mean = ReduceMean(present, one) z = Add(x, mean) "
    )
    weights = {"table": table, "head": head}
    plain = model(text + "g = MatMul(z, p) h = MatMul(g, m) a = Tanh(h) logits = MatMul(a, head) }",
                  **weights, p=p, m=m)  # fmt: skip
    product = (p.astype(np.float64) @ m.astype(np.float64)).astype(kind)
    merged = model(text + "h = MatMul(z, pm) a = Tanh(h) logits = MatMul(a, head) }",
                   **weights, pm=product)  # fmt: skip
    report = verify(plain, merged, greedy=32)
    assert report.ok, report.reason
    assert report.greedy.tokens == 32
    assert any("rounded to BFLOAT16" in note for note in report.notes)


def test_models_without_kernels_write_in_numpy():
    text = "m (int64[b, s] ids) => (double[b, s, 8] logits)"
    source = model(f"{text} {{ x = Gather(table, ids) logits = Gelu(x) }}", 20, table=counting())
    report = verify(source, source, greedy=5)
    assert report.greedy.equal
    assert any("both models ran in onnx.reference" in note for note in report.notes)


# --- Real exports --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("torch")
    from onnx_fold.models.export import export

    folder = tmp_path_factory.mktemp("decoders")

    def get(preset: str, exporter: str, **options):
        return export(preset, folder / f"{preset}.onnx", exporter=exporter, **options)

    return get


@pytest.mark.parametrize(
    ("preset", "exporter", "options"),
    [
        ("tiny-parallel", "dynamo", {"kv_cache": True}),
        ("tiny-mqa", "torchscript", {"kv_cache": True}),
        ("tiny-mha", "torchscript", {"kv_cache": False}),
        ("tiny-gqa", "torchscript", {"kv_cache": True, "dtype": "float16"}),
        ("tiny-mqa", "dynamo", {"kv_cache": True, "dtype": "bfloat16"}),
    ],
)
def test_a_fold_writes_what_the_original_writes(exported, preset, exporter, options):
    path = exported(preset, exporter, **options)
    result = fold(load(path))
    assert result.report.folded
    report = verify(path, result.model, greedy=64)
    assert report.ok, report.reason
    assert report.greedy.tokens == 64
    assert report.greedy.equal or report.greedy.ties < 4


def test_a_broken_fold_of_a_decoder_with_a_cache(exported):
    path = exported("tiny-parallel", "torchscript", kv_cache=True)
    broken = fold(load(path)).model
    head = broken.graph.initializers["lm_head.weight"]
    noise = 0.3 * normal(*head.const_value.shape, seed=5)
    head.const_value = ir.tensor(head.const_value.numpy() + noise, name=head.name)
    start = Decoder.of(load(path)).start()
    report = verify(path, broken, greedy=64)
    found = report.greedy
    assert not report.ok
    assert not found.ok
    assert found.position < 64

    tokens = [*start["input_ids"][0], *written(path, start, 64)[: found.position]]
    inputs = Decoder.of(load(path)).inputs(tokens)
    a, b = (function_of(source)(inputs)["logits"][0, -1] for source in (path, broken))
    assert (a.argmax(), b.argmax()) == (found.token_original, found.token_folded)
    assert found.margin_original == pytest.approx(a.max() - a[b.argmax()], rel=1e-3)
    assert found.margin_folded == pytest.approx(b.max() - b[a.argmax()], rel=1e-3)


# --- What cannot generate ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (model("m (float[n, 4] x) => (float[n, 4] y) { y = Neg(x) }"), "no input takes token ids"),
        (
            model("m (int64[b, s] ids) => (int64[b, s] y) { y = Neg(ids) }"),
            "no output has the logits of a vocabulary",
        ),
        (cached(seq="4"), "'input_ids' has a fixed length of 4"),
        (cached(batch="2"), "'input_ids' has a fixed batch of 2"),
        (cached(length="7"), "'past_key' has a fixed length"),
        (cached(names="past_key other"), "no output updates the cache input 'past_key'"),
    ],
)
def test_what_cannot_generate(source, message):
    with pytest.raises(UsageError, match=f"cannot generate: .*{message}"):
        verify(source, source, greedy=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"greedy": 0}, "at least one token"),
        ({"greedy": 3, "inputs": {"ids": [[1], [2]]}}, "one prompt: 'ids' has 2 rows of 1 tokens"),
        ({"greedy": 3, "inputs": {"ids": np.ones((1, 0), int)}}, "1 rows of 0 tokens"),
        ({"greedy": 3, "inputs": {}}, "input 'ids' is missing"),
    ],
)
def test_requests_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        verify(markov(counting()), markov(counting()), **options)


def test_an_original_that_stops_on_the_way():
    positions = "one = Constant<value_ints = [1]>() s = Shape(ids) n = Gather(s, one)"
    text = (
        f"m (int64[b, s] ids) => (float[b, s, 8] logits) {{ {positions} last = Sub(n, one)"
        " p = Gather(place, last) x = Gather(table, ids) logits = Add(x, p) }"
    )
    place = np.zeros((20, VOCABULARY), np.float32)
    source = model(text, table=counting().astype(np.float32), place=place)
    assert verify(source, source, greedy=13).ok
    with pytest.raises(
        UsageError, match="the original stops after 13 tokens: ONNX Runtime cannot run"
    ):
        verify(source, source, greedy=14)


# --- On the command line -------------------------------------------------------------------------


def test_the_command_line_says_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folded = counting()
    folded[5, 7] = 11
    for name, table in (("a", counting()), ("b", folded)):
        ir.save(markov(table), f"{name}.onnx")
    np.savez("prompt.npz", ids=[[0, 1]])

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["onnx-fold", "verify", *arguments, "--provider", "cpu"])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        return leave.value.code, " ".join(capsys.readouterr().out.split())

    code, out = run("a.onnx", "b.onnx", "--inputs", "prompt.npz", "--greedy", "16")
    assert code == 1
    assert "differs: greedy decoding: both write the same 4 of 16 tokens, then 6" in out

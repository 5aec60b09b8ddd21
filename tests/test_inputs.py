"""Inputs for any signature."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model

from onnx_fold.errors import UsageError
from onnx_fold.runtime import sessions
from onnx_fold.runtime.inputs import cache_links, index_limits, make_inputs
from onnx_fold.speed.timing import takes_tokens

BFLOAT16 = ir.DataType.BFLOAT16.numpy()


def decoder() -> ir.Model:
    """A signature as exporters write it: token ids, a mask over the cache, one cached layer."""
    return model(
        """
        decoder (int64[b0, s0] input_ids, int64[b0, "c0 + s0"] attention_mask,
                 int64[b0, s0] position_ids, float16[b0, 2, c0, 4] past_key_values_0_key)
            => (float16[b0, s0, 4] h, float16[b0, 2, c0, 4] k, int64[b0, m] mask)
        {
            ids = Cast<to = 6>(input_ids)
            tokens = Gather(vocab, ids)
            positions = Gather(table, position_ids)
            h = Add(tokens, positions)
            k = Identity(past_key_values_0_key)
            mask = Identity(attention_mask)
        }
        """,
        vocab=np.zeros((11, 4), np.float16),
        table=np.zeros((20, 4), np.float16),
    )


def test_inputs_of_a_decoder_agree_on_their_sizes():
    inputs = make_inputs(decoder(), batch=2, seq=6, past=5)
    shapes = {name: array.shape for name, array in inputs.items()}
    assert shapes == {
        "input_ids": (2, 6),
        "attention_mask": (2, 11),
        "position_ids": (2, 6),
        "past_key_values_0_key": (2, 2, 5, 4),
    }
    assert inputs["past_key_values_0_key"].dtype == np.float16
    np.testing.assert_array_equal(inputs["position_ids"][0], np.arange(5, 11))
    outputs = sessions.run(sessions.session(decoder()), inputs)
    np.testing.assert_array_equal(outputs["mask"], inputs["attention_mask"])


def test_token_ids_are_in_the_vocabulary_even_when_they_are_cast():
    assert index_limits(decoder()) == {"input_ids": 11, "position_ids": 20}
    ids = make_inputs(decoder(), batch=4, seq=64)["input_ids"]
    assert ids.min() == 0
    assert ids.max() == 10
    positions = make_inputs(decoder(), seq=64)["position_ids"]
    assert positions.max() == 19


def test_token_ids_inside_a_function_and_a_branch():
    text = """
        <ir_version: 9, opset_import: ["": 18, "my": 1]>
        m (int64[n] ids, bool c, float[6, 2] table) => (float[n, 2] y)
        {
            y = If(c) <
                then_branch = a () => (float[n, 2] p) { p = my.embed(table, ids) },
                else_branch = b () => (float[n, 2] q) { q = my.embed(table, ids) }
            >
        }
        <domain: "my", opset_import: ["": 18]>
        embed (t, i) => (o) { j = Identity(i)  o = Gather(t, j) }
    """
    assert index_limits(ir.from_onnx_text(text)) == {"ids": 6}


def test_one_row_of_a_batch_is_padded_and_every_query_keeps_a_key():
    cached = make_inputs(decoder(), batch=2, seq=4, past=4)["attention_mask"]
    np.testing.assert_array_equal(cached[1], [0, 0, 1, 1, 1, 1, 1, 1])
    empty = make_inputs(decoder(), batch=2, seq=8)["attention_mask"]
    np.testing.assert_array_equal(empty[1], [1, 1, 1, 1, 1, 1, 0, 0])
    assert cached[0].all()
    assert make_inputs(decoder(), batch=1)["attention_mask"].all()


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("int64[batch_size, total_sequence_length] attention_mask", (2, 11)),
        ('int64[batch, "past_sequence_length + 1"] attention_mask', (2, 6)),
        ("int64[b, past_seq_plus_seq] attention_mask", (2, 11)),
        ('float["batch_size*8", "Max(1, seq)"] x', (16, 6)),
        ("float[?, ?, 3] x", (2, 6, 3)),
        ("float[N, weird] x", (2, 3)),
        ("float[batch, num_channels, height] x", (2, 3, 9)),
        ("float[encoder_sequence_length, 7] x", (6, 7)),
        ("int64[s] cache_position", (6,)),
        ("float[1, 4] x", (1, 4)),
        ("float x", ()),
    ],
)
def test_symbolic_dimensions(declared, expected):
    source = model(f"m (float[1, 2, past_len, 4] past_k, {declared}) => () {{ }}")
    arrays = make_inputs(source, batch=2, seq=6, past=5, sizes={"height": 9})
    assert [a.shape for name, a in arrays.items() if name != "past_k"] == [expected]


def test_past_is_ignored_without_a_cache_and_fixed_sizes_win():
    plain = model("m (int64[batch, total_len] attention_mask) => () { }")
    assert make_inputs(plain, seq=6, past=5)["attention_mask"].shape == (1, 6)
    fixed = model("m (int64[1, 4] position_ids, float[1, 2, 7, 4] past_k) => () { }")
    positions = make_inputs(fixed, batch=3, seq=9, past=5)["position_ids"]
    np.testing.assert_array_equal(positions, [[7, 8, 9, 10]])


def test_the_kinds_of_values():
    source = model(
        "m (int64[batch, seq] token_type_ids, float[batch, 1, seq, total] attention_mask,"
        " bool[batch, seq] pad_mask, bool use_cache_branch, float[batch, 2, past, 4] past_k,"
        " int32 total_sequence_length, int32[batch] seqlens_k, bfloat16[4] x, string[2] s,"
        " bool[40] flags) => () { }"
    )
    inputs = make_inputs(source, batch=2, seq=3, past=5)
    assert set(np.unique(inputs["token_type_ids"])) <= {0, 1}
    assert not inputs["attention_mask"].any()
    assert inputs["attention_mask"].shape == (2, 1, 3, 8)
    assert inputs["pad_mask"].dtype == bool
    assert inputs["use_cache_branch"].item() is True
    assert inputs["total_sequence_length"].item() == 8
    np.testing.assert_array_equal(inputs["seqlens_k"], [7, 7])
    assert inputs["x"].dtype == BFLOAT16
    assert len(np.unique(inputs["flags"])) == 2


def test_inputs_are_seeded_and_defaults_are_not_fed():
    text = "m (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 1}> { y = Mul(x, w) }"
    source = model(text)
    first, again, other = (make_inputs(source, seed=seed) for seed in (1, 1, 2))
    assert list(first) == ["x"]
    np.testing.assert_array_equal(first["x"], again["x"])
    assert not np.array_equal(first["x"], other["x"])


def test_what_is_given_stays_and_shows_its_sizes():
    source = model(
        "m (int64[b, s] input_ids, float[b, frames, 2] encoder_states, float[frames] weights,"
        ' float[b, 2, p, 4] past_k, int64[b, "p + s"] attention_mask) => () { }'
    )
    given = {"encoder_states": np.ones((1, 7, 2)), "past_k": np.ones((1, 2, 5, 4), BFLOAT16)}
    inputs = make_inputs(source, seq=2, past=5, given=given)
    assert inputs["weights"].shape == (7,)
    assert inputs["attention_mask"].shape == (1, 7)
    for name, array in given.items():
        assert inputs[name] is array


def test_inputs_that_cannot_be_made():
    with pytest.raises(UsageError, match="not a tensor"):
        make_inputs(model("m (seq(float[n]) x) => () { }"))
    with pytest.raises(UsageError, match="dimension"):
        make_inputs(model("m (float[batch] x) => () { }"), batch=-1)


@pytest.mark.parametrize(
    ("past", "present", "links"),
    [
        ("past_key_values_0_key", "present_0_key", [0]),
        ("past_k past_v", "present_v present_k", [1, 0]),
        ("past_own past_cross", "present_own", [0, None]),
        ("cache_a cache_b", "present_0 present_1", [0, 1]),
        ("past_a past_b", "present_0", [None, None]),
    ],
)
def test_which_output_becomes_which_cache(past, present, links):
    names, outputs = past.split(), present.split()
    given = ", ".join(f"float[b, 2, p, 4] {name}" for name in names)
    results = ", ".join(f"float[b, 2, t, 4] {name}" for name in outputs)
    source = model(
        f"m (int64[b, s] input_ids, {given}) => (float[b, s, 9] logits, {results}) {{ }}"
    )
    assert [cache_links(source).get(name) for name in names] == [
        None if link is None else outputs[link] for link in links
    ]


def test_inputs_that_do_not_fit_in_memory():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 18]>'
        " g (float[84662395338752, 8] x) => (float[n, 8] y) { y = Neg(x) }"
    )
    with pytest.raises(UsageError, match="too much for the memory"):
        make_inputs(model)


def test_ranges():
    source = model(
        "m (float[n, 4] x, int64[n] steps, bool[n] kept, float[n] other) => (float[n, 4] y)"
        " { y = Identity(x) }"
    )
    ranges = {"x": (0.25, 0.5), "steps": (7, 9)}
    inputs = make_inputs(source, sizes={"n": 200}, ranges=ranges)
    assert inputs["x"].min() >= 0.25
    assert inputs["x"].max() <= 0.5
    assert inputs["x"].dtype == np.float32
    assert set(inputs["steps"]) == {7, 8, 9}
    assert inputs["other"].min() < 0
    with pytest.raises(UsageError, match="unknown input 'y': the model takes x, steps"):
        make_inputs(source, ranges={"y": (0, 1)})
    with pytest.raises(UsageError, match="'kept' holds no numbers"):
        make_inputs(source, ranges={"kept": (0, 1)})
    for wrong in ((1, 0), (np.nan, 1), (0, np.inf)):
        with pytest.raises(UsageError, match="range of input 'x'"):
            make_inputs(source, ranges={"x": wrong})
    with pytest.raises(UsageError, match="range of input 'steps'"):
        make_inputs(source, ranges={"steps": (0.2, 0.8)})  # no whole number is between


def test_images_are_as_large_as_networks_take_them():
    source = model(
        'm (float[n, 3, height, width] x, float[n, h, w, 3] y, float[n, 3, "?", "?"] z)'
        " => (float[a, b, c, d] s) { s = Identity(x) }"
    )
    source.graph.inputs[2].shape = ir.Shape([None, 3, -1, None])  # as other exporters write it
    shapes = {name: array.shape for name, array in make_inputs(source, batch=2).items()}
    assert shapes == {"x": (2, 3, 64, 64), "y": (2, 64, 64, 3), "z": (2, 3, 64, 64)}
    larger = make_inputs(source, image=96, sizes={"width": 32})
    assert [array.shape for array in larger.values()] == [
        (1, 3, 96, 32),
        (1, 96, 96, 3),
        (1, 3, 96, 96),
    ]


@pytest.mark.parametrize(
    ("signature", "tokens"),
    [
        ("float[b, t, 8] hidden_states", True),
        ("float[b, 80, 3000] input_features", False),
        ("float[b, t, 80] log_mel", False),
        ("float[b, 1, t] x", False),
        ("float[1, 50, 8] x", True),
    ],
)
def test_tokens_and_sound(signature, tokens):
    source = model(
        f"m ({signature}) => (float[a, b, c] y) {{ y = Identity({signature.split()[-1]}) }}"
    )
    assert takes_tokens(source) == tokens

"""What folding saves of a skipless transformer, by its shape alone."""

from __future__ import annotations

from rich.table import Table

from onnx_fold.base.tables import new_table
from onnx_fold.engine.cost import Cost, Saving
from onnx_fold.models.config import SkiplessConfig, num_parameters
from onnx_fold.models.presets import PRESETS
from onnx_fold.rewriting.panels import PANELS
from onnx_fold.streams.heads import attention_kind


def closed_streams(config: SkiplessConfig) -> int:
    """Number of streams of a skipless transformer that lose ``d²`` weights each.

    A serial block has two, one in front of Q, K and V and one between P and the FFN; a parallel
    block has one, in front of it. One more lies between the last block and the head. A model with
    norms has none.
    """
    return 0 if config.kept_norm != "none" else _streams(config)


def norm_streams(config: SkiplessConfig) -> int:
    """Number of streams with a norm that a rotation passes through, those of the same places.

    A residual model has one that runs through all blocks, and it is left alone.
    """
    return 0 if config.residual or config.norm == "none" else _streams(config)


def _streams(config: SkiplessConfig) -> int:
    return config.num_hidden_layers * (1 if config.parallel else 2) + 1


def panels(config: SkiplessConfig) -> int:
    """Into how many panels a triangle is cut that only Q, K and V can be: heads stay whole."""
    heads = config.hidden_size // config.head_dim
    return next(count for count in PANELS if heads % count == 0)


def rotated(config: SkiplessConfig) -> int:
    """Weights that rotation removes for size: ``(1 - 1/b) / 2 · d²`` a stream, with ``b`` panels.

    There are eight of them but where only a table writes the stream and only attention reads it, in
    front of the first block if it is serial.
    """
    streams, square = norm_streams(config), config.hidden_size**2
    counts = [PANELS[0]] * streams
    if streams and not config.parallel:
        counts[0] = panels(config)
    return sum((count - 1) * square // (2 * count) for count in counts)


def predicted(config: SkiplessConfig, streams_per_block: int | None = None) -> Saving:
    """Saving of a shape, by the formula, at two bytes a weight.

    That is ``d²`` for each closed stream, and :func:`rotated` for those with a norm.

    Args:
        config: The shape.
        streams_per_block: Count this many closed streams in each block instead of what an exact
            rewrite folds. The paper counts 2 for parallel blocks too, which is an architecture to
            train.
    """
    weights = num_parameters(config)
    square = config.hidden_size**2
    removed = closed_streams(config) * square + rotated(config)
    if streams_per_block is not None:
        removed = config.num_hidden_layers * streams_per_block * square
    left = weights - removed
    return Saving(Cost(weights, 2 * weights), Cost(left, 2 * left))


_CAPTION = (
    "Counted, not measured: decode is the ratio of the bytes that a token reads at batch 1;"
    "\npaper is the share of weights and the same ratio by its count. Measured: docs/speed.md"
)


def presets_table() -> Table:
    """What folding saves of each preset, by its shape; for the large ones the paper's table.

    "L" is the number of blocks, "of d²" the share of d² that each stream loses (all,
    or 7/16 where norms stay). Nothing of it is measured: the ratios are those of bytes.

    The paper (arXiv 2404.12362) counts P and Q of parallel blocks too. That is an architecture to
    train; an exact rewrite of a trained parallel model removes one of them.
    """
    table = new_table("Presets")
    table.caption, table.caption_justify = _CAPTION, "left"
    table.add_column("preset", no_wrap=True)
    table.add_column("attention")
    table.add_column("block", no_wrap=True)
    for column in ("d", "L", "of d²", "weights", "folded", "saved", "decode", "paper"):
        table.add_column(column, justify="right")
    for name, shape in PRESETS.items():
        exact, paper = predicted(shape), predicted(shape, streams_per_block=2)
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        table.add_row(
            name,
            f"{attention_kind(heads, kv_heads)} {heads}/{kv_heads}",
            f"{'parallel' if shape.parallel else 'serial'} {shape.ffn}",
            str(shape.hidden_size),
            str(shape.num_hidden_layers),
            f"{_share(shape):.3g}",
            _short(exact.before.weights),
            _short(exact.after.weights),
            f"{exact.share:.0%}",
            f"{exact.speedup:.2f}x",
            f"{paper.share:.0%}, {paper.speedup:.2f}x",
        )
    return table


def _share(shape: SkiplessConfig) -> float:
    """What a stream loses of d², in the mean."""
    removed = closed_streams(shape) + rotated(shape) / shape.hidden_size**2
    return removed / _streams(shape)


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)

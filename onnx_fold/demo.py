"""The whole story on a small trained model that comes along: fold, compare texts, time both."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from onnx_fold.base.arguments import Objective, Provider
from onnx_fold.errors import UsageError
from onnx_fold.files.load import load
from onnx_fold.pipeline import fold
from onnx_fold.report.verdict import verdict
from onnx_fold.runtime.generate import Decoder, greedy
from onnx_fold.runtime.sessions import resolve_provider, run, session
from onnx_fold.speed.timing import bench

PROMPT = "def read_lines(path):\n    "

TEMPERATURE, SEED = 0.5, 0
"""How both models sample; with the same random numbers they write the same text."""

NARROW = (
    "\nA triangle is read in panels, a product each: in a model as narrow as this one they cost"
    " more time than the weights save.\nFolded for speed it stays as it is; wide models gain, see"
    " docs/norms.md."
)


def run_demo(
    console: Console,
    *,
    prompt: str | None = None,
    tokens: int = 96,
    provider: Provider = "auto",
    norms: bool = False,
) -> bool:
    """Fold a shipped model, let both models continue ``prompt``, time both; then another, in short.

    Args:
        console: Where to print.
        prompt: Text to continue; None for a piece of Python.
        tokens: Characters to write.
        provider: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        norms: Tell at length, and alone, of the other one, which keeps its norms. It is narrow, so
            it is folded for size.

    Returns:
        Whether the folded models wrote the same text as the original ones.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: The prompt has characters that the model does not know.
    """
    provider, prompt = resolve_provider(provider), prompt or PROMPT
    folder = resources.files("onnx_fold.models")
    with (
        resources.as_file(folder / "char-gqa.onnx") as plain,
        resources.as_file(folder / "char-gqa-norms.onnx") as with_norms,
    ):
        for each in (plain, with_norms):
            encode(prompt, _vocabulary(load(each)))  # it is refused before anything is told
        if norms:
            same = _tell(console, with_norms, prompt, tokens, provider, "size", "with RMSNorm")
            console.print(NARROW)
            return same
        how = "towards orthogonal projections Q and P"
        same = _tell(console, plain, prompt, tokens, provider, "speed", how)
        return _tell_in_short(console, with_norms, prompt, tokens, provider) and same


def _tell(
    console: Console,
    path: Path,
    prompt: str,
    tokens: int,
    provider: Provider,
    objective: Objective,
    how: str,
) -> bool:
    console.print(
        f"A skipless GQA transformer, trained on Python source ({_loss(path)}) {how}: {path.name},"
        f" {path.stat().st_size / 1e6:.1f} MB.\n"
    )
    result = fold(path, provider=provider, objective=objective)
    console.print(result.report)
    with TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        result.save(folded)
        before, after = (_written(each, prompt, tokens, provider) for each in (path, folded))
        console.print(f"\nA sample of {tokens} characters, from the original:")
        console.print(Padding(Text.assemble((prompt, "bold"), before), (0, 4)))
        if before == after:
            console.print("and from the folded model: [bold green]the same text[/].\n")
        else:
            console.print("and from the folded model, which [bold red]differs[/]:")
            console.print(Padding(Text.assemble((prompt, "bold"), after), (0, 4)))
        console.print(bench(path, folded, provider=provider, repeats=100))
    return before == after


def _tell_in_short(
    console: Console, path: Path, prompt: str, tokens: int, provider: Provider
) -> bool:
    result = fold(path, provider=provider, objective="size")
    before, after = (_written(each, prompt, tokens, provider) for each in (path, result.ir))
    text = "the same text" if before == after else "[bold red]another text[/]"
    console.print(
        f"\nAnd an ordinary one, trained without that, which keeps its norms ({_loss(path)}),"
        f" folded for size: {verdict(result.report)} It writes {text}."
        " At length: onnx-fold demo --norms"
    )
    return before == after


def _loss(path: Path) -> str:
    return f"{float(load(path).metadata_props['onnx_fold.val_loss']):.2f} nats a character"


def _vocabulary(model: ir.Model) -> list[str]:
    characters: list[str] = json.loads(model.metadata_props["onnx_fold.vocab"])
    return characters


def _written(model: Path | ir.Model, prompt: str, tokens: int, provider: Provider) -> str:
    """What ``model`` writes after ``prompt``, with random numbers that are the same each time."""
    loaded = load(model)
    vocabulary = _vocabulary(loaded)
    noise = np.random.default_rng(SEED).gumbel(scale=TEMPERATURE, size=(tokens, len(vocabulary)))
    decoder = Decoder.of(loaded)
    start = decoder.inputs(encode(prompt, vocabulary))
    function = functools.partial(run, session(model, provider))
    written = greedy(decoder, function, start, tokens, noise)
    return "".join(vocabulary[token] for token, _ in written)


def encode(text: str, vocabulary: Sequence[str]) -> list[int]:
    """Token ids of ``text``, one a character.

    Raises:
        UsageError: It is empty, or has characters that are not in the vocabulary.
    """
    ids = {character: index for index, character in enumerate(vocabulary)}
    unknown = sorted(set(text) - ids.keys())
    if unknown or not text:
        raise UsageError(f"the model does not know {unknown}" if unknown else "the prompt is empty")
    return [ids[character] for character in text]

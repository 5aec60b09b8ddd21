"""The whole story on a small trained model that comes along: fold, compare texts, time both."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from onnx_fold.base.arguments import Provider
from onnx_fold.errors import UsageError
from onnx_fold.files.load import load
from onnx_fold.pipeline import fold
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

SECOND = "\nThe same with an ordinary one, which keeps its norms: onnx-fold demo --norms"


def run_demo(
    console: Console,
    *,
    prompt: str | None = None,
    tokens: int = 96,
    provider: Provider = "auto",
    norms: bool = False,
) -> bool:
    """Fold a shipped model, let both models continue ``prompt``, time both.

    Args:
        console: Where to print.
        prompt: Text to continue; None for a piece of Python.
        tokens: Characters to write.
        provider: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        norms: Take the model that keeps its norms. It is narrow, so it is folded for size.

    Returns:
        Whether both wrote the same text.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: The prompt has characters that the model does not know.
    """
    provider = resolve_provider(provider)
    name = "char-gqa-norms.onnx" if norms else "char-gqa.onnx"
    with resources.as_file(resources.files("onnx_fold.models") / name) as path:
        return _tell(console, path, prompt or PROMPT, tokens, provider, norms)


def _tell(
    console: Console, path: Path, prompt: str, tokens: int, provider: Provider, norms: bool
) -> bool:
    original = load(path)
    vocabulary = json.loads(original.metadata_props["onnx_fold.vocab"])
    decoder = Decoder.of(original)
    start = decoder.inputs(encode(prompt, vocabulary))
    loss = float(original.metadata_props["onnx_fold.val_loss"])
    console.print(
        f"A skipless GQA transformer, trained on Python source ({loss:.2f} nats a character)"
        f" {'with RMSNorm' if norms else 'towards orthogonal projections Q and P'}:"
        f" {path.name}, {path.stat().st_size / 1e6:.1f} MB.\n"
    )
    result = fold(path, provider=provider, objective="size" if norms else "speed")
    console.print(result.report)
    with TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        result.save(folded)
        texts = []
        random = np.random.default_rng(SEED)
        noise = random.gumbel(scale=TEMPERATURE, size=(tokens, len(vocabulary)))
        for model in (path, folded):
            function = functools.partial(run, session(model, provider))
            written = greedy(decoder, function, start, tokens, noise)
            texts.append("".join(vocabulary[token] for token, _ in written))
        same = texts[0] == texts[1]
        console.print(f"\nA sample of {tokens} characters, from the original:")
        console.print(Padding(Text.assemble((prompt, "bold"), texts[0]), (0, 4)))
        if same:
            console.print("and from the folded model: [bold green]the same text[/].\n")
        else:
            console.print("and from the folded model, which [bold red]differs[/]:")
            console.print(Padding(Text.assemble((prompt, "bold"), texts[1]), (0, 4)))
        console.print(bench(path, folded, provider=provider, repeats=100))
        console.print(NARROW if norms else SECOND)
    return same


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

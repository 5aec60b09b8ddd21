"""The whole story on the small trained model that comes along: fold, compare texts, time both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from onnx_fold.bench import bench
from onnx_fold.errors import UsageError
from onnx_fold.files import load
from onnx_fold.inputs import make_inputs
from onnx_fold.pipeline import fold
from onnx_fold.runtime import resolve_provider, run, session

PROMPT = "def read_lines(path):\n    "


def run_demo(
    console: Console, *, prompt: str | None = None, tokens: int = 96, provider: str = "auto"
) -> bool:
    """Fold the shipped model, let both models continue ``prompt``, time both.

    Args:
        console: Where to print.
        prompt: Text to continue; None for a piece of Python.
        tokens: Characters to write.
        provider: ``"cpu"``, ``"cuda"`` or ``"auto"``.

    Returns:
        Whether both wrote the same text.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: The prompt has characters that the model does not know.
    """
    provider = resolve_provider(provider)
    with resources.as_file(resources.files("onnx_fold.models") / "char-gqa.onnx") as path:
        return _tell(console, path, prompt or PROMPT, tokens, provider)


def _tell(console: Console, path: Path, prompt: str, tokens: int, provider: str) -> bool:
    original = load(path)
    vocabulary = json.loads(original.metadata_props["onnx_fold.vocab"])
    encode(prompt, vocabulary)  # say at once what it cannot read
    loss = float(original.metadata_props["onnx_fold.val_loss"])
    console.print(
        f"A skipless GQA transformer, trained on Python source ({loss:.2f} nats a character):"
        f" {path.name}, {path.stat().st_size / 1e6:.1f} MB.\n"
    )
    result = fold(path, provider=provider)
    console.print(result.report)
    with TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        result.save(folded)
        texts = [
            continue_text(original, session(model, provider), vocabulary, prompt, tokens)
            for model in (path, folded)
        ]
        same = texts[0] == texts[1]
        console.print(f"\nGreedy text, {tokens} characters, from the original:")
        console.print(Padding(Text.assemble((prompt, "bold"), texts[0]), (0, 4)))
        if same:
            console.print("and from the folded model: [bold green]the same text[/].\n")
        else:
            console.print("and from the folded model, which [bold red]differs[/]:")
            console.print(Padding(Text.assemble((prompt, "bold"), texts[1]), (0, 4)))
        console.print(bench(path, folded, provider=provider, repeats=100))
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


def continue_text(
    model: ir.Model, session: Any, vocabulary: Sequence[str], prompt: str, tokens: int
) -> str:
    """Let a character model with a KV cache write the most likely text, one character at a time.

    Args:
        model: The model, for the names and types of its inputs.
        session: An ONNX Runtime session of it, or of a model with the same inputs and outputs.
        vocabulary: The character of each token id.
        prompt: Text to continue.
        tokens: Characters to write.

    Raises:
        UsageError: The prompt has characters that the model does not know.
    """
    feeds = make_inputs(model, batch=1, seq=len(prompt), past=0)
    feeds["input_ids"] = np.array([encode(prompt, vocabulary)], dtype=np.int64)
    written: list[str] = []
    for _ in range(tokens):
        feeds["attention_mask"] = np.ones((1, _past(feeds) + feeds["input_ids"].shape[1]), np.int64)
        outputs = run(session, feeds)
        best = int(outputs["logits"][0, -1].argmax())
        written.append(vocabulary[best])
        feeds = {name.replace("present", "past_key_values"): a for name, a in outputs.items()}
        del feeds["logits"]
        feeds["input_ids"] = np.array([[best]], dtype=np.int64)
    return "".join(written)


def _past(feeds: dict[str, Any]) -> int:
    return len(next(a for name, a in feeds.items() if name.startswith("past_key_values"))[0, 0])

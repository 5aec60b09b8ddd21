"""Train the small skipless character model that ships with the package.

``python -m onnx_fold.models.train -o models/char-gqa.onnx --minutes 22``, and its twin that keeps
an RMSNorm in front of attention, FFN and head:
``python -m onnx_fold.models.train --norms -o models/char-gqa-norms.onnx --minutes 25``

The text is the Python standard library's own source, every twentieth file held out. Matrices are
trained with orthogonalised momentum (Muon: Jordan et al. 2024), the rest with Adam. Nothing but
the weights sets the scale of a stream without norms, so each matrix keeps the norm it started with.
In a serial skipless block only ``O Q`` and ``P M`` matter, so keeping Q and P orthogonal costs no
expressiveness; they are pulled back after each step, and a fold that solves with Q stays exact.
With norms neither is needed, and the rate can be larger: their gains set the scale, and a rotation
solves with nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from onnx_fold.models.config import SkiplessConfig, num_parameters
from onnx_fold.models.export import export_module
from onnx_fold.models.skipless import SkiplessTransformer

UNKNOWN: Final = "\N{REPLACEMENT CHARACTER}"
VOCABULARY: Final = ["\n", "\t", *map(chr, range(32, 127)), UNKNOWN]
CONFIG: Final = SkiplessConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=40,
    intermediate_size=640,
    ffn="mlp",
    activation="gelu",
    positions="alibi",
    alibi_slope=2.0,
)
NORMED: Final = dataclasses.replace(CONFIG, norm="rms")
SKIPPED: Final = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
CONTEXT: Final = 256  # characters of a training window
BATCH: Final = 8  # windows of a step
HELD_OUT_WINDOWS: Final = 256
RATES: Final = {"none": 0.01, "rms": 0.03}
"""The largest step of a matrix, by the norms that are kept."""

logger = logging.getLogger(__name__)


def read_corpus() -> tuple[Tensor, Tensor]:
    """Return the standard library's source as uint8 token ids: training part, held-out part.

    The tables of ``encodings`` are much alike, so those held out would only flatter the model.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(root.rglob("*.py")) if not SKIPPED & {*p.relative_to(root).parts}]
    table = {character: i for i, character in enumerate(VOCABULARY)}
    train: list[int] = []
    held_out: list[int] = []
    for i, path in enumerate(paths):
        text = path.read_text(encoding="utf-8", errors="replace")
        if i % 20:
            train.extend(table.get(c, table[UNKNOWN]) for c in text)
        elif path.parent.name != "encodings":
            held_out.extend(table.get(c, table[UNKNOWN]) for c in text)
    return torch.tensor(train, dtype=torch.uint8), torch.tensor(held_out, dtype=torch.uint8)


def windows(tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return int64 inputs and targets [len(starts), CONTEXT]."""
    chunk = tokens[starts[:, None] + torch.arange(CONTEXT + 1)].long()
    return chunk[:, :-1], chunk[:, 1:]


def loss_of(model: SkiplessTransformer, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats per character."""
    logits, _ = model.step(inputs)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: SkiplessTransformer, tokens: Tensor) -> float:
    """Mean nats per character over windows spread evenly over ``tokens``."""
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, HELD_OUT_WINDOWS).long()
    losses = [loss_of(model, *windows(tokens, part)) for part in torch.split(starts, 16)]
    return float(torch.stack(losses).mean())


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values near 1 (Muon's quintic Newton-Schulz iteration)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum; then each matrix gets the norm back that it started with.

    The ``orthogonal`` ones are pulled to the nearest orthogonal matrix instead.
    """

    def __init__(
        self, free: Sequence[Tensor], orthogonal: Sequence[Tensor], lr: float, momentum: float = 0.9
    ) -> None:
        groups = [
            {"params": list(free), "orthogonal": False},
            {"params": list(orthogonal), "orthogonal": True},
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        for matrix in (*free, *orthogonal):
            self.state[matrix] = {"buffer": torch.zeros_like(matrix), "norm": matrix.norm()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices from their gradients."""
        for group in self.param_groups:
            for matrix in group["params"]:
                buffer = self.state[matrix]["buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalize(matrix.grad.lerp(buffer, group["momentum"]))
                rows, columns = matrix.shape
                matrix.sub_(update, alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)
                if group["orthogonal"]:
                    matrix.sub_(0.5 * (matrix @ matrix.T @ matrix - matrix))
                else:
                    matrix.mul_(self.state[matrix]["norm"] / matrix.norm())


def learning_rate(done: float, step: int) -> float:
    """Share of the peak learning rate: 50 steps of warm-up, then a cosine down to 1 %."""
    return min(1.0, (step + 1) / 50) * max(0.01, 0.5 * (1 + math.cos(math.pi * done)))


def train(model: SkiplessTransformer, tokens: Tensor, minutes: float, seed: int = 0) -> int:
    """Train ``model`` on ``tokens`` for a given time, and return the number of characters read."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        return windows(tokens, starts)

    model.train().scale_to_data(batch()[0])
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    has_norms = model.config.norm != "none"
    matrices = {n: p for n, p in model.layers.named_parameters() if p.ndim == 2}
    names = () if has_norms else ("q_proj.weight", ".p_proj.weight")
    square = [matrices.pop(n) for n in list(matrices) if n.endswith(names)]
    gains = [p for p in model.parameters() if p.ndim == 1]
    others = [model.embed_tokens.weight, model.lm_head.weight, *gains]
    optimizers = [
        Muon([*matrices.values()], square, lr=RATES[model.config.norm]),
        torch.optim.Adam(others, lr=3e-3, betas=(0.9, 0.95)),
    ]
    peaks = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    start, step, average = time.perf_counter(), 0, math.log(len(VOCABULARY))
    while (done := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group, peak in peaks:
            group["lr"] = peak * learning_rate(done, step)
        loss = loss_of(model, *batch())
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average += 0.02 * (loss.item() - average)
        if step % 100 == 0:
            logger.info("%3.0f %%  step %5d  training loss %.3f", 100 * done, step, average)
        step += 1
    model.eval()
    return step * BATCH * CONTEXT


def main() -> None:
    """Train, validate, export."""
    parser = argparse.ArgumentParser(description="Train the skipless character model.")
    parser.add_argument("-o", "--output", type=Path, default=Path("char-gqa.onnx"))
    parser.add_argument("--minutes", type=float, default=22.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--norms", action="store_true", help="keep an RMSNorm in front of each part"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)

    training, held_out = read_corpus()
    config = NORMED if arguments.norms else CONFIG
    model = SkiplessTransformer(config, seed=arguments.seed)
    logger.info("%d parameters, %d characters", num_parameters(config), len(training))
    characters = train(model, training, arguments.minutes, arguments.seed)
    loss = validate(model, held_out)
    metadata = {
        "onnx_fold.vocab": json.dumps(VOCABULARY),
        "onnx_fold.val_loss": f"{loss:.4f}",
        "onnx_fold.description": "Skipless GQA character model of Python source (standard library)"
        + ", with RMSNorm" * arguments.norms,
    }
    export_module(model, arguments.output, opset=20, kv_cache=True, metadata=metadata)
    for name, weight in model.named_parameters():
        if name.endswith("q_proj.weight"):
            logger.info("%s: condition number %.4f", name, torch.linalg.cond(weight.detach()))
    logger.info("%d characters read", characters)
    logger.info("held-out loss %.4f nats per character", loss)


if __name__ == "__main__":
    main()

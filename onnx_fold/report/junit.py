"""The parity check as JUnit XML, a test case for each output: for continuous integration."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from onnx_fold.check.parity import ParityReport
from onnx_fold.files.output import replacing

__all__ = ["junit", "write_junit"]

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold; names in a model may."""


def write_junit(report: ParityReport, path: str | os.PathLike[str], name: str) -> None:
    """Write ``report`` to ``path``.

    Args:
        report: What :func:`onnx_fold.verify` returned.
        path: File to write; one that is there is replaced.
        name: Name of the suite, such as those of the models.

    Raises:
        CannotWriteError: The file cannot be written.
    """
    target = Path(path)
    with replacing(target) as folder:
        (folder / target.name).write_bytes(junit(report, name))


def junit(report: ParityReport, name: str) -> bytes:
    """``report`` as an XML document in UTF-8."""
    cases = list(_cases(report))
    failures = sum(bool(reason) for _, reason, _ in cases)
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0"}
    root = ElementTree.Element("testsuites", {"name": "onnx-fold verify", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _legal(name), **counts})
    if date := report.environment.get("date"):
        suite.set("timestamp", str(date))
    for case, reason, details in cases:
        found = {"classname": "onnx_fold.verify", "name": _legal(case)}
        element = ElementTree.SubElement(suite, "testcase", found)
        if reason:
            ElementTree.SubElement(element, "failure", {"message": _legal(reason)})
        if details:
            ElementTree.SubElement(element, "system-out").text = _legal(details)
    if report.notes:
        ElementTree.SubElement(suite, "system-out").text = _legal("\n".join(report.notes))
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, "utf-8", xml_declaration=True)
    return document


def _cases(report: ParityReport) -> Iterator[tuple[str, str, str]]:
    """Name, reason of a failure, and figures of each test case."""
    for output in report.outputs:
        details = f"relative error {output.relative_error:.3g}"
        if output.margin is not None:
            details += f", {output.margin:.3g} of its limit ({output.judged})"
        yield f"output {output.name}", "" if output.ok else output.reason or "differs", details
    for name, check in (("weights as stored", report.stored), ("greedy text", report.greedy)):
        if check is not None:
            yield name, "" if check.ok else str(check), str(check)
    if not report.outputs:
        yield "same function", "" if report.ok else report.reason or "differs", ""


def _legal(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)

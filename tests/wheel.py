"""What a wheel holds: ``python tests/wheel.py dist/*.whl``, which ``make dist`` runs."""

from __future__ import annotations

import sys
import zipfile

NEEDED = (
    "onnx_fold/py.typed",
    "onnx_fold/__main__.py",
    "onnx_fold/models/char-gqa.onnx",
    "onnx_fold/models/char-gqa-norms.onnx",
    "onnx_fold/passes/merge.py",
    "onnx_fold/report/templates/content.html",
    "onnx_fold/report/templates/page.html",
    "onnx_fold/report/templates/style.css",
)


def faults(names: list[str]) -> list[str]:
    """What is missing of a wheel, and what should not be in it."""
    missing = [f"no {name}" for name in NEEDED if name not in names]
    own = [name for name in names if ".dist-info/" not in name]
    strange = [f"{name} is not of the package" for name in own if not name.startswith("onnx_fold/")]
    tests = [f"{name} is a test" for name in own if "test" in name.lower()]
    return [*missing, *strange, *tests]


if __name__ == "__main__":
    for path in sys.argv[1:]:
        found = faults(zipfile.ZipFile(path).namelist())
        if found:
            sys.exit(f"{path}: {'; '.join(found)}")
        print(f"{path}: whole, and nothing else in it")

"""``python -m onnx_fold`` is the command line."""

from onnx_fold.cli import main

if __name__ == "__main__":
    main()

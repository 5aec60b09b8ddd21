"""Folding as a step of other tools: PyTorch, onnx_ir, folders of exporters, Olive."""

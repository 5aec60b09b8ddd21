"""Fold consecutive linear projections of ONNX transformers into single initializers."""

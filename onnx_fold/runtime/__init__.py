"""ONNX Runtime: sessions, inputs for any signature, greedy decoding, the environment.

It runs models and knows nothing of folds.
"""

"""Skipless transformers in PyTorch that train and export, and one small trained model."""

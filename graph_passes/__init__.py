"""Passes over `onnx_ir` models that put Sigma-Weighted Shuffle into a UNet graph."""

"""Passes over `onnx_ir` models that insert Sigma-Weighted Shuffle into a UNet graph and lower it."""

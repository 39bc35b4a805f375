"""Stable-Diffusion UNets with Sigma-Weighted Shuffle attention, as ONNX graphs and TensorRT engines."""

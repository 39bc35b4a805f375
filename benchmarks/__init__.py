"""Benchmarks of the exported graphs, their runtimes and the TensorRT plugins."""

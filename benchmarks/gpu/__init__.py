"""Correctness and timing of the plugin kernels on a GPU."""

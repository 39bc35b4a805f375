"""Reads UNet checkpoints: their architecture and the location of each tensor. Weights are read one by one."""

from sws_export.checkpoint.check import WeightShapes, check_tensors, expected_shapes
from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.model import Checkpoint
from sws_export.checkpoint.reader import open_checkpoint
from sws_export.checkpoint.weights import FusedWeights, read_tensor, verify_weights

__all__ = [
    "Checkpoint",
    "FusedWeights",
    "StoredTensor",
    "WeightShapes",
    "check_tensors",
    "expected_shapes",
    "open_checkpoint",
    "read_tensor",
    "verify_weights",
]

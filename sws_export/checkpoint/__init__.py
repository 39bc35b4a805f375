"""Reads UNet checkpoints: what they are and where their weights lie. Nothing is loaded as a whole."""

from sws_export.checkpoint.check import check_tensors
from sws_export.checkpoint.header import StoredTensor
from sws_export.checkpoint.model import Checkpoint
from sws_export.checkpoint.reader import open_checkpoint
from sws_export.checkpoint.weights import FusedWeights, read_tensor, verify_weights

__all__ = [
    "Checkpoint",
    "FusedWeights",
    "StoredTensor",
    "check_tensors",
    "open_checkpoint",
    "read_tensor",
    "verify_weights",
]

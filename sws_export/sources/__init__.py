"""What an export starts from: a checkpoint, or a plain ONNX graph. Both have the same interface."""

from sws_export.sources.source import Source, open_source

__all__ = ["Source", "open_source"]

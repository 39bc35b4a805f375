"""A torch module to an ONNX graph, by running it once on the meta device.

`torch.export` and torch's ONNX exporter do the same for any module; on a UNet they take a minute or more,
nearly all of it in symbolic arithmetic on sizes. A UNet needs about forty torch functions and sizes that
are products, so it is recorded here directly, in about a second.
"""

from sws_export.tracing.record import trace

__all__ = ["trace"]

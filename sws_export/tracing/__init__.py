"""Records a torch module as an ONNX graph by running it on the meta device.

torch's ONNX exporter supports any module, but needs a minute or more for a UNet, mostly for symbolic
arithmetic on sizes. A UNet uses about forty torch functions and only products of sizes; recording those
directly takes about a second.
"""

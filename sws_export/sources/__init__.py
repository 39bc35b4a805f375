"""What an export starts from: a checkpoint, or a plain ONNX graph."""

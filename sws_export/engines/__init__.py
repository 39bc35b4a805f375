"""Engine backends: building an engine from an ONNX file, and reading the header of its plan."""

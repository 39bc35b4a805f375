"""The presets: which method is inserted into the graph."""

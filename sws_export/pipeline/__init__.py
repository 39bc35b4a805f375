"""The export pipeline: from a UNet to a validated graph and an engine."""

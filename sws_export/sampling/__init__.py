"""Images sampled with and without SWS, side by side."""

"""Pictures with and without SWS, side by side."""

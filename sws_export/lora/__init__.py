"""LoRA files: reading them, matching their names, fusing them into the weights."""

"""LoRA files: reading them, matching their names with the UNet's, fusing them into its weights."""

"""Running artefacts in other programs: diffusers, ComfyUI, Triton Inference Server, Polygraphy."""

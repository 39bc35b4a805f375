"""Sessions inside other programs: diffusers, ComfyUI, Triton Inference Server, polygraphy."""

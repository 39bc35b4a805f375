"""What an export was measured to need: all figures of the preflight, with where they come from.

Times are those of two idle processor cores; benchmarks/README.md has the measurements and the rule. The
memory of an engine build is in `engines/choice.py`, a figure of each backend.
"""

EXPORT_MEMORY = 800_000_000
"""Measured on SD1.5 and SDXL in float16: 0.67 and 0.8 GB. Weights are not read before they are written."""

VALIDATION_PARTITION_MEMORY = 800_000_000
"""In addition, a partition of the graph and its float32 copies in ONNX Runtime; 0.6 GB measured on SD1.5."""
VALIDATION_FACTOR = 5
"""A graph that is not partitioned needs this many times its weights."""

CALIBRATION_PARTITION_MEMORY = 1_100_000_000
"""As for the validation, with the inputs of all layers and their weights twice: 1.85 GB in all on SD1.5."""

UNQUANTIZED_SHARE = 0.035
"""Of the weights with `--weights`: embeddings, first and last convolution, small layers; SD1.5 has 3.3 %."""

# Seconds. SD1.5 (0.86 B parameters, 1.72 GB) and SDXL (2.57 B, 5.14 GB), both float16.
START_SECONDS = 5.0
"""Loading torch and diffusers: what is left of 9.5 s (SD1.5) and 20 s (SDXL) after the stages."""
CHECK_SECONDS_PER_GB = 2.1
"""Reading and hashing stored weights: 3.7 s and 5.8 s (14.8 s on a busy machine)."""
EXPORT_SECONDS_PER_GB = 1.2
"""Recording, rewriting and writing the graph: 1.8 s and 6.7 s."""
CONVERT_SECONDS_PER_GB = 2.6
"""On top of that, where weights are converted: 9.0 s for 3.44 GB of float32."""
VALIDATION_SECONDS_PER_BILLION = 25.0
"""Five steps in both: 19 s and 54 s."""
CALIBRATION_SECONDS_PER_BILLION = 150.0
"""Ten steps and the error of each layer: 132 s on SD1.5 without SWS, on one core beside other programs."""
BUILD_SECONDS_PER_BILLION = {"plain": 20.0, "sws": 50.0}
"""17 s and 38 s on SD1.5; SDXL with SWS took 317 s beside other programs."""

# Bytes of a plan: SD1.5 1.745 GB plain and 1.797 GB with SWS, of 1.719 GB; SDXL with SWS 5.21 GB, of 5.135;
# the example with SWS 40 MB, of 11 MB. The profile hardly counts: 1.80 and 1.81 GB for SD1.5 with SWS up to
# 2 x 768 x 768 and 4 x 1024 x 1024 pixels.
PLAN_KERNELS = {"plain": 10_000_000, "sws": 30_000_000}
PLAN_FACTOR = {"plain": 1.015, "sws": 1.03}
PLAN_SPREAD = 0.05
PLAN_TURING = 1.2
"""With compute capability 7.5 among the targets."""

# Values of activations per channel of the first level and pixel of the latent, both at their largest:
# 84 MB for the plain SD1.5 in float16 at 2 x 512 x 512 pixels, 104 MB with SWS; 303 and 345 MB for SDXL at
# 2 x 1024 x 1024 pixels (benchmarks/rtx.py). A float32 engine has the logits of one attention twice:
# logits and weights.
ACTIVATION_FACTOR = {"plain": 16.0, "sws": 18.5}
ACTIVATION_BASE = {"plain": 0, "sws": 8_000_000}
"""Whatever the sizes: 12.5 and 16.6 MB for the example in float16 at 2 and 4 x 32 x 32."""
ACTIVATION_SPREAD = 0.5

#!/usr/bin/env bash
# Runs the whole GPU benchmark once: benchmarks/gpu/run.sh
#
# Needs Python with a CUDA build of PyTorch, nvcc and a GPU; no network. Results go to the folder $OUT (default:
# benchmarks/results/gpu). Packages for the whole-UNet part are taken from build/gpu-wheels if it exists; see
# benchmarks/gpu/fetch_wheels.sh. PYTHON names the interpreter, SECONDS_LIMIT the time for everything (default 500).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
{ nvidia-smi; nvcc --version; } > "$out/machine.txt" 2>&1 || true
exec "${PYTHON:-python3}" -u -m benchmarks.gpu.run --out "$out/gpu.json" --wheels build/gpu-wheels \
  --seconds "${SECONDS_LIMIT:-500}" "$@" > >(tee "$out/log.txt") 2>&1

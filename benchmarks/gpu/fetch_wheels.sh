#!/usr/bin/env bash
# Downloads diffusers and what it needs for the machine that runs run.sh: Python 3.12 on Linux x86-64, no network.
# The wheels go to build/gpu-wheels (ignored by git); together they must not exceed 64 MiB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=build/gpu-wheels
rm -rf "$folder"
"${PYTHON:-python3}" -m pip download --quiet --no-input --only-binary=:all: --python-version 3.12 \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest "$folder" "diffusers>=0.35" "numpy>=2"
bytes=$(cat "$folder"/*.whl | wc -c)
echo "$(ls "$folder" | wc -l) wheels, $((bytes / 1048576)) MiB in $folder"
if [ "$bytes" -gt $((64 * 1048576)) ]; then
  echo "the wheels exceed 64 MiB" >&2
  exit 1
fi

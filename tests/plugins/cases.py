"""Test cases on disk for the harness: numbers in case.txt, tensors as raw files."""

import dataclasses
import subprocess
from pathlib import Path

import numpy as np
import torch

from tests.plugins.toolchain import run

FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass
class Harness:
    """Runs one case at a time in fresh folders below `folder`."""

    program: Path
    folder: Path
    count: int = 0

    def run(self, values: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
        """Writes the case, runs it, returns the folder with the results."""
        case = self.write(values, tensors)
        run([str(self.program), str(case)])
        return case

    def failure(self, values: dict[str, object]) -> str:
        """The message with which the harness rejects the case."""
        result = subprocess.run(
            [self.program, self.write(values, {})], capture_output=True, text=True, check=False
        )
        assert result.returncode == 1
        return result.stderr

    def write(self, values: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
        """The case's folder."""
        self.count += 1
        case = self.folder / f"case{self.count}"
        case.mkdir()
        (case / "case.txt").write_text("".join(f"{name} {value}\n" for name, value in values.items()))
        for name, tensor in tensors.items():
            tensor.contiguous().view(torch.uint8).numpy().tofile(case / f"{name}.bin")
        return case


def read_tensor(file: Path, dtype: torch.dtype) -> torch.Tensor:
    """A raw file as a flat tensor."""
    return torch.from_numpy(np.fromfile(file, dtype=np.uint8)).view(dtype)

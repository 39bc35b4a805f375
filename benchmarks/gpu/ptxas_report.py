"""Registers, spills and static shared memory of every kernel, from the output of `ptxas -v` in a build log.

`python -m benchmarks.gpu.ptxas_report BUILD_LOG` prints a Markdown table.
"""

import dataclasses
import re
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class KernelUsage:
    """Resources of one kernel on one architecture; sizes in bytes per thread (shared memory: per block)."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int


_COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_ptxas_log(log: str) -> list[KernelUsage]:
    """One entry for each kernel and architecture."""
    usages: list[KernelUsage] = []
    kernel = architecture = ""
    frame = (0, 0, 0)
    for line in log.splitlines():
        if match := _COMPILING.search(line):
            kernel, architecture = readable_name(match.group(1)), match.group(2)
        elif match := _FRAME.search(line):
            frame = (int(match.group(1)), int(match.group(2)), int(match.group(3)))
        elif match := _REGISTERS.search(line):
            shared = _SHARED.search(line)
            usages.append(
                KernelUsage(
                    kernel, architecture, int(match.group(1)), *frame, int(shared.group(1)) if shared else 0
                )
            )
    return usages


def readable_name(mangled: str) -> str:
    """`transport_tensor_core_kernel<Float16, 8>` from its mangled name."""
    name = re.search(r"\d+([a-z_]+_kernel)", mangled)
    elements = {"NS_7Float16E": "float16", "NS_8BFloat16E": "bfloat16", "If": "float32"}
    arguments = [text for mark, text in elements.items() if mark in mangled]
    arguments += re.findall(r"Li(\d+)E", mangled)
    base = name.group(1) if name else mangled
    return f"{base}<{', '.join(arguments)}>" if arguments else base


def as_table(usages: list[KernelUsage]) -> str:
    """Markdown: a row for each kernel, its registers on each architecture."""
    architectures = sorted(
        {usage.architecture for usage in usages}, key=lambda name: int(name[3:].rstrip("af"))
    )
    registers = {(usage.kernel, usage.architecture): usage.registers for usage in usages}
    spilling = {usage.kernel for usage in usages if usage.spill_stores or usage.spill_loads or usage.stack}
    lines = [
        "| kernel | " + " | ".join(architectures) + " | spills |",
        "|---" * (len(architectures) + 2) + "|",
    ]
    for kernel in sorted({usage.kernel for usage in usages}):
        cells = [str(registers.get((kernel, name), "")) for name in architectures]
        lines.append(f"| {kernel} | " + " | ".join(cells) + f" | {'yes' if kernel in spilling else 'none'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_table(parse_ptxas_log(Path(sys.argv[1]).read_text())))

"""Records the Python API of a TensorRT release from its bindings, without TensorRT's libraries or a GPU.

    python -m tests.sws_export.engines.tensorrt_api.record 10.14.1.48.post1 10.16.1.11 11.4.0.106

fetches each `tensorrt-cu13-bindings` wheel from PyPI and writes its classes, signatures and enum members to a
JSON file beside this one. The bindings link to TensorRT's libraries; stub libraries that export the missing
symbols are enough to import them.
"""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
VERSIONS = ("10.14.1.48.post1", "10.16.1.11", "11.4.0.106")
CLASSES = (
    "Builder", "IBuilderConfig", "IOptimizationProfile", "ITimingCache", "INetworkDefinition", "ITensor",
    "ILayer", "IAttentionBoundaryLayer", "IAttentionInputLayer", "IAttention", "OnnxParser", "ParserError",
    "IPluginRegistry", "IHostMemory", "IStreamWriter", "ILogger", "IProgressMonitor", "Runtime",
    "ICudaEngine", "IExecutionContext",
)  # fmt: skip
ENUMS = (
    "NetworkDefinitionCreationFlag", "BuilderFlag", "OnnxParserFlag", "HardwareCompatibilityLevel",
    "DataType", "LayerType", "ILogger.Severity", "TensorIOMode", "ExecutionContextAllocationStrategy",
)  # fmt: skip
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def fetch(version: str, folder: Path) -> Path:
    """The unpacked wheel of a release, made importable.

    Raises:
        subprocess.CalledProcessError: The wheel cannot be fetched, or there is no C compiler.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    subprocess.run(
        [*pip, f"tensorrt-cu13-bindings=={version}", "--dest", str(folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    bindings = folder / "tensorrt_bindings"
    missing = subprocess.run(
        ["nm", "-D", "--undefined-only", bindings / "tensorrt.so"], check=True, capture_output=True, text=True
    ).stdout
    names = {line.split()[-1] for line in missing.splitlines() if " U " in line and "@" not in line}
    source = folder / "stubs.c"
    source.write_text(
        "".join(f"void *{name}(void) {{ return 0; }}\n" for name in sorted(names) if name[0] != "P")
    )
    major = version.partition(".")[0]
    for library in LIBRARIES:
        target = bindings / f"lib{library}.so.{major}"
        command = [
            "cc",
            "-shared",
            "-fPIC",
            "-w",
            f"-Wl,-soname,{target.name}",
            str(source),
            "-o",
            str(target),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def describe(folder: Path) -> dict[str, Any]:
    """The API of the release in `folder`; imported by a process of its own."""
    result = subprocess.run(
        [sys.executable, "-P", __file__, "--describe", str(folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    api: dict[str, Any] = json.loads(result.stdout)
    return api


def _describe_module(trt: Any) -> dict[str, Any]:
    return {
        "version": trt.__version__,
        "enums": {name: _describe_enum(_lookup(trt, name)) for name in ENUMS},
        "classes": {name: _describe_class(getattr(trt, name)) for name in CLASSES},
    }


def _lookup(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _describe_enum(enum: Any) -> dict[str, Any]:
    members = enum.__members__
    first, second = list(members.values())[:2]
    try:
        ordered = (first <= second) or (second <= first)
    except TypeError:
        ordered = False
    return {"ordered": ordered, "members": {name: int(value) for name, value in members.items()}}


def _describe_class(cls: type) -> dict[str, Any]:
    methods, properties = {}, {}
    for name, member in vars(cls).items():
        if isinstance(member, property):
            kind = re.search(r"-> (.*)", (member.fget.__doc__ or "") if member.fget else "")
            properties[name] = {
                "writable": member.fset is not None,
                "type": _plain(kind[1]) if kind else "object",
            }
        elif callable(member) and (name == "__init__" or not name.startswith("_")):
            signatures = re.findall(rf"^(?:\d+\. )?({name}\(self.*)$", member.__doc__ or "", re.MULTILINE)
            if signatures:
                methods[name] = [_plain(signature) for signature in signatures]
    return {
        "base": cls.__base__.__name__ if cls.__base__.__name__ in CLASSES else None,
        "methods": dict(sorted(methods.items())),
        "properties": dict(sorted(properties.items())),
    }


def _plain(text: str) -> str:
    """A signature without module paths, in the spelling of one pybind11 version."""
    text = re.sub(r"tensorrt_bindings\.tensorrt\.|nvonnxparser::I?|nvinfer1::", "", text)
    text = re.sub(r"typing_extensions\.Buffer|\bbuffer\b", "bytes", text)
    text = re.sub(r"typing_extensions\.CapsuleType", "capsule", text)
    text = text.replace("typing.SupportsInt", "int").replace("typing.SupportsFloat", "float")
    return re.sub(r"\b(List|Tuple|Dict)\b", lambda match: match[1].lower(), text).strip()


def main() -> None:
    """Record the releases named on the command line, by default all of VERSIONS."""
    if sys.argv[1:2] == ["--describe"]:
        sys.path.insert(0, sys.argv[2])
        import tensorrt_bindings

        print(json.dumps(_describe_module(tensorrt_bindings)))
        return
    for version in sys.argv[1:] or VERSIONS:
        with TemporaryDirectory() as folder:
            api = describe(fetch(version, Path(folder)))
        path = HERE / f"{'.'.join(version.split('.')[:2])}.json"
        path.write_text(json.dumps(api, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()

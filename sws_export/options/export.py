"""All options of an export."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from graph_passes.weight_formats import WEIGHT_FORMATS
from sws_export.errors import OptionError
from sws_export.files import ENGINE_SUFFIXES
from sws_export.options.arguments import group_from_arguments
from sws_export.options.engine import EngineOptions
from sws_export.options.quantization import QuantizationOptions
from sws_export.options.sizes import SizeOptions
from sws_export.options.source import SourceOptions
from sws_export.options.sws import SwsOptions

ArtefactKind = Literal["onnx", "engine"]

_BACKEND_HELP = (
    "tensorrt-rtx (default of an engine without a GPU), tensorrt, or onnxruntime-cuda for an .onnx that runs "
    "on a GPU; default of an .onnx: ONNX Runtime on the CPU"
)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `sws_export.export`, as on the command line.

    Attributes:
        source: How the checkpoint is read and what is fused into it.
        sws: Which attention sites get SWS, and how it is computed.
        quantization: What is stored in 8 bits.
        sizes: Batch, height, width and tokens.
        engine: How an engine is built.
        backend: `tensorrt-rtx` or `tensorrt`: builds the engine, or is the target of an ONNX graph;
            `onnxruntime-cuda`: the target of an ONNX graph. None for an engine of the backend that suits the
            machine, or a graph for ONNX Runtime on the CPU.
        validate: Compare the graph with the reference before anything is written.
        keep_onnx: Keep the ONNX graph beside an engine.
        cache: Use and keep the results of other runs.
        dry_run: Stop after the preflight.
    """

    source: SourceOptions = field(default_factory=SourceOptions)
    sws: SwsOptions = field(default_factory=SwsOptions)
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    sizes: SizeOptions = field(default_factory=SizeOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    backend: str | None = None
    validate: bool = True
    keep_onnx: bool = False
    cache: bool = True
    dry_run: bool = False

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of all groups and those of the run itself."""
        for group in (SourceOptions, SwsOptions, QuantizationOptions, SizeOptions, EngineOptions):
            group.add_arguments(parser)
        run = parser.add_argument_group("run")
        run.add_argument("--backend", metavar="NAME", help=_BACKEND_HELP)
        run.add_argument("--no-validate", action="store_true", help="do not compare with the reference")
        run.add_argument("--keep-onnx", action="store_true", help="keep the graph beside the engine")
        run.add_argument("--no-cache", action="store_true", help="disable the cache")
        run.add_argument("--dry-run", action="store_true", help="print the expected needs and stop")

    @classmethod
    def from_arguments(cls, parsed: argparse.Namespace) -> "ExportOptions":
        """The options that were parsed by the arguments of `add_arguments`.

        Raises:
            OptionError: An option is malformed, out of range, or contradicts another one.
        """
        parsed = argparse.Namespace(**vars(parsed), activations=None)
        if parsed.precision in WEIGHT_FORMATS:
            # The rest of the UNet has the precision of an engine by default.
            parsed.precision, parsed.activations = None, parsed.precision
        return cls(
            source=group_from_arguments(SourceOptions, parsed),
            sws=SwsOptions.from_arguments(parsed),
            quantization=group_from_arguments(QuantizationOptions, parsed),
            sizes=group_from_arguments(SizeOptions, parsed),
            engine=group_from_arguments(EngineOptions, parsed),
            backend=parsed.backend,
            validate=not parsed.no_validate,
            keep_onnx=parsed.keep_onnx,
            cache=not parsed.no_cache,
            dry_run=parsed.dry_run,
        )


def artefact_kind(out: Path) -> ArtefactKind:
    """What is to be written, from the suffix of `--out`.

    Raises:
        OptionError: The suffix is that of neither an ONNX graph nor an engine, or a manifest cannot have the
            name.
    """
    if out.suffix not in (".onnx", *ENGINE_SUFFIXES):
        found = out.suffix or out.name
        raise OptionError(f"--out {out}: expected a name ending in .onnx, .plan or .engine, found '{found}'")
    # `--help` needs no package.
    from sws_export.documents import FileName, check_document

    try:
        # The length is for the file system to judge.
        check_document(out.name[:255], FileName)
    except ValueError as error:
        raise OptionError(
            f"--out {out}: expected a file name that manifests can have: no control characters, no '\\', no "
            "drive letter such as D:"
        ) from error
    return "onnx" if out.suffix == ".onnx" else "engine"

"""Engine backends: build a TensorRT engine (a plan) from an ONNX file."""

from sws_export.engines.backend import Backend, BuildOptions
from sws_export.engines.build import EngineReport, build_engine
from sws_export.engines.choice import choose_backend, engine_memory_estimate
from sws_export.engines.header import PlanHeader, plan_header

__all__ = [
    "Backend",
    "BuildOptions",
    "EngineReport",
    "PlanHeader",
    "build_engine",
    "choose_backend",
    "engine_memory_estimate",
    "plan_header",
]

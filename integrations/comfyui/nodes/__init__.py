"""The nodes, by the names that workflows refer to."""

from typing import Any

from .convert import ConvertToSwsEngine
from .live import SigmaWeightedShuffle
from .load import LoadSwsEngine, SetSwsIntensity

NODE_CLASS_MAPPINGS: dict[str, Any] = {
    "LoadSwsEngine": LoadSwsEngine,
    "SetSwsIntensity": SetSwsIntensity,
    "SigmaWeightedShuffleLive": SigmaWeightedShuffle,
    "ConvertToSwsEngine": ConvertToSwsEngine,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadSwsEngine": "Load SWS engine",
    "SetSwsIntensity": "Set SWS intensity",
    "SigmaWeightedShuffleLive": "Sigma-Weighted Shuffle (live)",
    "ConvertToSwsEngine": "Convert to SWS engine",
}

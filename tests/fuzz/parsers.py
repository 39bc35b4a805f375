"""The parsers of files from outside, each with a valid file, its damaged copies, and what reads them."""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sws_export.cache import Cache
from sws_export.cache.digests import DigestCache, file_stamps
from sws_export.cache.keys import cache_key
from sws_export.checkpoint import open_checkpoint
from sws_export.checkpoint.check import expected_shapes
from sws_export.engines.header import plan_header
from sws_export.inspection import inspect_file
from sws_export.lora.fuse import open_lora
from sws_export.manifest import read_embedded, read_manifest
from sws_export.progress import SilentProgress
from sws_export.runtime.contract import read_contract
from sws_export.sources.onnx import open_onnx_source
from tests.export_runs import check_names
from tests.fuzz.mutations import damaged_bytes, damaged_document, damaged_json

MANIFEST = Path(__file__).parents[1] / "sws_export" / "manifest" / "recorded" / "format_1_sws.json"
CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
    "transformer_layers_per_block": 1,
    "sample_size": 16,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "upcast_attention": None,
}
INDEX = "diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PEFT = {
    "unet.r": 2,
    "unet.lora_alpha": 4,
    "unet.rank_pattern": {"to_q": 2},
    "unet.alpha_pattern": {"attn1.to_q": 3, "to_.*": 5},
    "unet.peft_type": "LORA",
}
SITE = "mid_block.attentions.0.transformer_blocks.0.attn1"
LAYER = f"{SITE}.to_q"
PLAN = b"vtrt" + bytes(12) + (64).to_bytes(8, "little") + bytes([1, 7, 1, 116]) + bytes(4) + b"\x08"
PLAN = PLAN.ljust(64, b"\0")

Content = bytes | tuple[bytes, int]
"""The bytes of a file, and its length if zeros follow."""


@dataclass(frozen=True)
class Parser:
    """What reads one kind of file.

    Attributes:
        name: For the table.
        write: Writes the other files to a directory.
        place: Path of the file in the directory.
        valid: Its undamaged content.
        damaged: Its damaged contents.
        read: Reads it; gets the directory.
    """

    name: str
    write: Callable[[Path], object]
    place: str
    valid: Content
    damaged: st.SearchStrategy[Content]
    read: Callable[[Path], object]


def put(file: Path, content: Content) -> None:
    """Write a file; zeros at its end take no space on disk."""
    data, length = content if isinstance(content, tuple) else (content, len(content))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(data)
        stream.truncate(max(length, len(data)))


def safetensors_header(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> dict[str, Any]:
    """Entries of float16 tensors, one after the other."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    return entries


def safetensors(header: Any) -> Content:
    """A file with this header, and zeros as far as its offsets say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    ends = [0]
    if isinstance(header, dict):
        for entry in header.values():
            offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
            ends += [end for end in offsets or () if type(end) is int] if isinstance(offsets, list) else []
    return len(text).to_bytes(8, "little") + text, min(8 + len(text) + max(ends), 2**34)


@st.composite
def damaged_safetensors(draw: st.DrawFn, header: dict[str, Any]) -> Content:
    """A file with a damaged header, or with damaged bytes in front of the tensors."""
    if draw(st.integers(0, 2)):
        # Some of the changes concern few tensors, where consistent files are more likely.
        return safetensors(draw(damaged_document(header)))
    content = safetensors(header)
    assert isinstance(content, tuple)
    data, length = content
    return draw(damaged_bytes(data, window=draw(st.sampled_from((8, 400, len(data)))))), length


def small_graph() -> bytes:
    """A graph with a UNet's inputs and output, and names of two levels."""
    weights = np.zeros((4, 4, 1, 1), np.float32)
    nodes = [
        helper.make_node("Conv", ["sample", "w"], ["a"], name="down_blocks.0.resnets.0.conv1/Conv"),
        helper.make_node("Conv", ["a", "w"], ["b"], name="down_blocks.1.resnets.0.conv1/Conv"),
        helper.make_node(
            "Attention", ["encoder_hidden_states"] * 3, ["f"], q_num_heads=2, kv_num_heads=2, name=f"{SITE}/A"
        ),
        helper.make_node("ReduceMean", ["f"], ["c"], keepdims=0),
        helper.make_node("ReduceMean", ["timestep"], ["d"], keepdims=0),
        helper.make_node("Add", ["c", "d"], ["e"]),
        helper.make_node("Add", ["b", "e"], ["out_sample"]),
    ]

    def value(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        "unet",
        [
            value("sample", "b", 4, "h", "w"),
            value("timestep", "b"),
            value("encoder_hidden_states", "b", "t", 16),
        ],
        [value("out_sample", "b", 4, "h", "w")],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return bytes(model.SerializeToString())


def manifest_document() -> dict[str, Any]:
    """A manifest of format 2 for the file `e.plan`."""
    document: dict[str, Any] = dict(read_manifest(MANIFEST))
    shape = {"batch": 2, "height": 16, "width": 16, "tokens": 7, "height/2": 8, "width/2": 8}
    profile = {
        entry["name"]: {
            name: [shape.get(size, size) if isinstance(size, str) else size for size in entry["shape"]]
            for name in ("min", "opt", "max")
        }
        for entry in document["inputs"]
    }
    entry = {"name": "e.plan", "bytes": len(PLAN), "sha256": hashlib.sha256(PLAN).hexdigest()}
    return document | {
        "artefact": "e.plan",
        "files": [entry],
        "engine": {"backend": "tensorrt-rtx"},
        "target": "tensorrt-rtx",
        "profile": profile,
    }


@functools.cache
def unet_header() -> dict[str, Any]:
    """The header of a UNet of `CONFIG`."""
    shapes = expected_shapes({name: value for name, value in CONFIG.items() if not name.startswith("_")})
    return safetensors_header(shapes, {"format": "pt", "modelspec.prediction_type": "v"})


def write_unet(folder: Path) -> None:
    """A UNet directory."""
    put(folder / WEIGHTS, safetensors(unet_header()))
    put(folder / "config.json", json.dumps(CONFIG).encode())


def read_unet(folder: Path) -> None:
    """Headers, configuration, and the UNet that they describe, on the meta device."""
    check_names(open_checkpoint(folder))


def read_index(folder: Path) -> None:
    """The same by the shard index."""
    check_names(open_checkpoint(folder / INDEX))


def read_lora(folder: Path) -> None:
    """A LoRA of the UNet, with shapes."""
    open_lora(folder / "lora.safetensors", open_checkpoint(folder))


def read_graph(folder: Path) -> None:
    """A plain graph as the source of an export, with its weights."""
    read_embedded(folder / "g.onnx")
    source = open_onnx_source(folder / "g.onnx")
    source.describe()
    assert source.size_multiple
    source.read_weights(SilentProgress())


def read_artefact(folder: Path) -> None:
    """A manifest alone and with its engine."""
    inspect_file(folder / "e.plan.json")
    read_contract(folder / "e.plan", verify=False)


def read_plan(folder: Path) -> None:
    """The header of an engine, and the engine with its manifest."""
    plan_header(folder / "e.plan")
    inspect_file(folder / "e.plan")


def write_plan(folder: Path) -> None:
    """The engine of `manifest_document`."""
    put(folder / "e.plan", PLAN)


def write_manifest(folder: Path) -> None:
    """The manifest of the engine."""
    put(folder / "e.plan.json", json.dumps(manifest_document()).encode())


def nothing(folder: Path) -> None:
    """No other files are needed."""


def write_cached(folder: Path) -> None:
    """The file of a cache entry."""
    put(folder / "cache" / "entries" / "graph-key" / "graph.onnx", b"graph")


def read_cache(folder: Path) -> None:
    """All entries, and the files of one."""
    cache = Cache(folder / "cache", 10**9)
    cache.entries()
    entry = cache.get("graph", "key")
    for name in entry.files if entry is not None else ():
        assert entry is not None
        cache.extract(entry, name, folder / "extracted")


def read_digest(folder: Path) -> None:
    """A stored digest."""
    file = folder / "weights"
    put(file, b"weights")
    name = f"{cache_key({'files': [str(file.resolve())]})}.json"
    put(folder / "digests" / name, (folder / "digest.json").read_bytes())
    DigestCache(folder / "digests").get([file])


def parsers() -> list[Parser]:
    """All parsers."""
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(unet_header(), WEIGHTS)}
    del index["weight_map"]["__metadata__"]
    pairs = {f"unet.{LAYER}.lora_A.weight": (2, 64), f"unet.{LAYER}.lora_B.weight": (64, 2)}
    lora = safetensors_header(pairs, {"lora_adapter_metadata": json.dumps(PEFT)})
    entry = {
        "files": {"graph.onnx": {"bytes": 5, "sha256": hashlib.sha256(b"graph").hexdigest()}},
        "metadata": {"label": "a"},
    }
    digest = {"files": file_stamps([MANIFEST])[0], "sha256": "0" * 64}
    place = "cache/entries/graph-key/entry.json"
    manifest, header = manifest_document(), unet_header()
    unet, graph = safetensors(header), small_graph()
    return [
        Parser("checkpoint header", write_unet, WEIGHTS, unet, damaged_safetensors(header), read_unet),
        Parser(
            "shard index", write_unet, f"{WEIGHTS}.index.json", text(index), damaged_json(index), read_index
        ),
        Parser("config.json", write_unet, "config.json", text(CONFIG), damaged_json(CONFIG), read_unet),
        Parser("LoRA", write_unet, "lora.safetensors", safetensors(lora), damaged_lora(lora), read_lora),
        Parser("plain ONNX", nothing, "g.onnx", graph, damaged_bytes(graph), read_graph),
        Parser("manifest", write_plan, "e.plan.json", text(manifest), damaged_json(manifest), read_artefact),
        Parser("plan header", write_manifest, "e.plan", PLAN, damaged_bytes(PLAN), read_plan),
        Parser("cache entry", write_cached, place, checked_entry(entry), damaged_entry(entry), read_cache),
        Parser("cached digest", nothing, "digest.json", text(digest), damaged_json(digest), read_digest),
    ]


def text(document: Any) -> bytes:
    """A document as JSON."""
    return json.dumps(document).encode()


def checked_entry(content: Any) -> bytes:
    """A cache entry with the checksum of its content."""
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return text({"content": content, "sha256": checksum})


@st.composite
def damaged_lora(draw: st.DrawFn, header: dict[str, Any]) -> Content:
    """A damaged LoRA, or one with damaged PEFT metadata."""
    if draw(st.booleans()):
        return draw(damaged_safetensors(header))
    metadata = draw(damaged_json(PEFT)).decode(errors="replace")
    return safetensors(header | {"__metadata__": {"lora_adapter_metadata": metadata}})


@st.composite
def damaged_entry(draw: st.DrawFn, content: dict[str, Any]) -> bytes:
    """A damaged cache entry; half of them have the checksum of their content."""
    if draw(st.booleans()):
        return draw(damaged_json(json.loads(checked_entry(content))))
    return checked_entry(draw(damaged_document(content)))

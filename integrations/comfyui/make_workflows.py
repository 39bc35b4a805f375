"""Writes example_workflows/: each workflow as JSON, and as an image that holds it.

    python integrations/comfyui/make_workflows.py

ComfyUI reads the workflow from the text chunk `workflow` of a PNG that is dropped on its window.
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

FOLDER = Path(__file__).parent / "example_workflows"
WIDTH, COLUMN, SCALE = 300, 360, 0.5
TITLE, ROW = 30, 22

# Inputs that are links, values of the widgets, and outputs of each kind of node.
KINDS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "CheckpointLoaderSimple": ([], [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")]),
    "LoadSwsEngine": ([], [("model", "MODEL"), ("info", "STRING")]),
    "SetSwsIntensity": ([("model", "MODEL")], [("MODEL", "MODEL")]),
    "SigmaWeightedShuffleLive": ([("model", "MODEL")], [("MODEL", "MODEL")]),
    "ConvertToSwsEngine": ([("model", "MODEL")], [("MODEL", "MODEL")]),
    "LoraLoaderModelOnly": ([("model", "MODEL")], [("MODEL", "MODEL")]),
    "CLIPTextEncode": ([("clip", "CLIP")], [("CONDITIONING", "CONDITIONING")]),
    "EmptyLatentImage": ([], [("LATENT", "LATENT")]),
    "KSampler": (
        [
            ("model", "MODEL"),
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent_image", "LATENT"),
        ],
        [("LATENT", "LATENT")],
    ),
    "VAEDecode": ([("samples", "LATENT"), ("vae", "VAE")], [("IMAGE", "IMAGE")]),
    "SaveImage": ([("images", "IMAGE")], []),
}


class Workflow:
    """A workflow in the format of ComfyUI's editor."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(
        self, kind: str, place: tuple[int, int], values: list[Any], **inputs: tuple[dict[str, Any], str]
    ) -> dict[str, Any]:
        """A node at a column and a height, with the values of its widgets and the sources of its inputs."""
        slots, outputs = KINDS[kind]
        node: dict[str, Any] = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [place[0] * COLUMN, place[1]],
            "size": [WIDTH, TITLE + ROW * (max(len(slots), len(outputs)) + len(values)) + 10],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [{"name": name, "type": kind, "link": None} for name, kind in slots],
            "outputs": [
                {"name": name, "type": kind, "links": [], "slot_index": index}
                for index, (name, kind) in enumerate(outputs)
            ],
            "properties": {"Node name for S&R": kind},
            "widgets_values": values,
        }
        for name, (source, output) in inputs.items():
            target = next(index for index, slot in enumerate(slots) if slot[0] == name)
            origin = next(i for i, slot in enumerate(source["outputs"]) if slot["name"] == output)
            link = len(self.links) + 1
            self.links.append([link, source["id"], origin, node["id"], target, slots[target][1]])
            node["inputs"][target]["link"] = link
            source["outputs"][origin]["links"].append(link)
        self.nodes.append(node)
        return node

    def sample(self, model: tuple[dict[str, Any], str], loader: dict[str, Any], side: int) -> None:
        """Prompts, sampler, VAE and image, from column 2 on."""
        prompts = [
            self.add("CLIPTextEncode", (2, y), [text], clip=(loader, "CLIP"))
            for y, text in ((180, "a lighthouse on a cliff at dusk, detailed"), (300, "blurry, low quality"))
        ]
        latent = self.add("EmptyLatentImage", (2, 420), [side, side, 1])
        sampled = self.add(
            "KSampler",
            (3, 180),
            [7, "fixed", 25, 6.5, "euler", "normal", 1.0],
            model=model,
            positive=(prompts[0], "CONDITIONING"),
            negative=(prompts[1], "CONDITIONING"),
            latent_image=(latent, "LATENT"),
        )
        decoded = self.add("VAEDecode", (4, 180), [], samples=(sampled, "LATENT"), vae=(loader, "VAE"))
        self.add("SaveImage", (4, 300), ["sws"], images=(decoded, "IMAGE"))

    def as_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def draw(self) -> Image.Image:
        """An image of the nodes and links."""
        right = max(node["pos"][0] + node["size"][0] for node in self.nodes) + 20
        bottom = max(node["pos"][1] + node["size"][1] for node in self.nodes) + 20
        picture = Image.new("RGB", (int(right * SCALE) + 10, int(bottom * SCALE) + 10), (32, 32, 32))
        pen = ImageDraw.Draw(picture)

        def at(x: float, y: float) -> tuple[float, float]:
            return x * SCALE + 10, y * SCALE + 10

        by_id = {node["id"]: node for node in self.nodes}
        for _, source, origin, target, slot, _ in self.links:
            start, end = by_id[source], by_id[target]
            begin = at(start["pos"][0] + WIDTH, start["pos"][1] + TITLE + ROW * (origin + 0.5))
            pen.line(
                [begin, at(end["pos"][0], end["pos"][1] + TITLE + ROW * (slot + 0.5))], (150, 150, 90), 2
            )
        for node in self.nodes:
            (x, y), (width, height) = node["pos"], node["size"]
            pen.rectangle([at(x, y), at(x + width, y + height)], (58, 58, 62), (110, 110, 110))
            pen.text(at(x + 10, y + 6), node["type"], (230, 230, 230))
            slots = max(len(node["inputs"]), len(node["outputs"]))
            for line, value in enumerate(node["widgets_values"]):
                pen.text(at(x + 10, y + TITLE + ROW * (slots + line)), str(value)[:24], (170, 190, 210))
        return picture


def load_workflow(engine: str, checkpoint: str, side: int) -> Workflow:
    """txt2img with an engine."""
    workflow = Workflow()
    engine_node = workflow.add("LoadSwsEngine", (0, 0), [engine])
    loader = workflow.add("CheckpointLoaderSimple", (0, 180), [checkpoint])
    strength = workflow.add("SetSwsIntensity", (1, 0), [0.5], model=(engine_node, "model"))
    workflow.sample((strength, "MODEL"), loader, side)
    return workflow


def convert_workflow() -> Workflow:
    """A checkpoint with a LoRA, converted, and sampled; the live node beside it, to tune before."""
    workflow = Workflow()
    loader = workflow.add("CheckpointLoaderSimple", (0, 180), ["v1-5-pruned-emaonly-fp16.safetensors"])
    lora = workflow.add("LoraLoaderModelOnly", (0, 0), ["lora.safetensors", 0.8], model=(loader, "MODEL"))
    sizes = ["1:2:4", "512:512:768", "512:512:768", "77:77:154", False]
    converted = workflow.add(
        "ConvertToSwsEngine",
        (1, 0),
        ["lighthouse", "TensorRT for RTX engine", "fp16", *sizes],
        model=(lora, "MODEL"),
    )
    strength = workflow.add("SetSwsIntensity", (2, 0), [0.5], model=(converted, "MODEL"))
    workflow.add("SigmaWeightedShuffleLive", (1, 420), [0.5], model=(lora, "MODEL"))
    workflow.sample((strength, "MODEL"), loader, 512)
    return workflow


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    workflows = {
        "txt2img_sd15": load_workflow("sd15.plan", "v1-5-pruned-emaonly-fp16.safetensors", 512),
        "txt2img_sdxl": load_workflow("sdxl.plan", "sd_xl_base_1.0.safetensors", 1024),
        "convert": convert_workflow(),
    }
    for name, workflow in workflows.items():
        text = json.dumps(workflow.as_json(), indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        held = PngInfo()
        held.add_text("workflow", text)
        workflow.draw().save(FOLDER / f"{name}.png", pnginfo=held, optimize=True)


if __name__ == "__main__":
    main()

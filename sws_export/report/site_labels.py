"""Short names of attention sites."""

from collections.abc import Iterable

_BLOCKS = ("down", "mid", "up")


def site_labels(paths: Iterable[str]) -> dict[str, str]:
    """A short, unique name of each site, in the order down, mid, up.

    `down_blocks.1.attentions.0.transformer_blocks.0.attn1` is `down 1 · 0 · 0`, and its `attn2` has the
    suffix `text`. Trailing numbers are dropped if the names stay unique.
    """
    sites = {path: _parts(path) for path in paths}
    ordered = sorted(sites, key=lambda path: (_BLOCKS.index(sites[path][0]), *sites[path][1:]))
    fewest = min(len(numbers) for _, numbers, _ in sites.values())
    for dropped in range(fewest, -1, -1):
        labels = {path: _label(*sites[path], dropped) for path in ordered}
        if len(set(labels.values())) == len(labels):
            break
    return labels


def _parts(path: str) -> tuple[str, list[int], str]:
    """The block, the indices in the path, and `text` for cross-attention."""
    block, *rest, attention = path.split(".")
    numbers = [int(part) for part in rest if part.isdigit()]
    return block.split("_")[0], numbers, "text" if attention == "attn2" else ""


def _label(block: str, numbers: list[int], kind: str, dropped: int) -> str:
    kept = " · ".join(map(str, numbers[: len(numbers) - dropped]))
    return " ".join(filter(None, (block, kept, kind)))

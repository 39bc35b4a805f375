"""Short names of attention sites."""

from collections.abc import Iterable

_BLOCKS = ("down", "mid", "up")


def site_labels(paths: Iterable[str]) -> dict[str, str]:
    """A short name of each site, from the way down to the way up.

    `down_blocks.1.attentions.0.transformer_blocks.0.attn1` is `down 1 · 0 · 0`, its `attn2` ends in `text`;
    numbers at the end that tell no two sites apart are left out.
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
    """The block, the numbers on the way to the site, and whose keys it has."""
    block, *rest, attention = path.split(".")
    numbers = [int(part) for part in rest if part.isdigit()]
    return block.split("_")[0], numbers, "text" if attention == "attn2" else ""


def _label(block: str, numbers: list[int], kind: str, dropped: int) -> str:
    kept = " · ".join(map(str, numbers[: len(numbers) - dropped]))
    return " ".join(filter(None, (block, kept, kind)))

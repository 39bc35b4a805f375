"""`--preset node` on a graph: which sites the published node patches, and the bases it needs there."""

import fnmatch
from collections.abc import Sequence

import onnx_ir as ir

from graph_passes.find_sites import Site, SkippedSite
from graph_passes.grids import TEXT
from graph_passes.insert_comfyui_node import InsertComfyUINode, basis_widths
from graph_passes.parameters import SwsParameters
from sws_export.errors import ExportError
from sws_export.reference.orthonormal_basis import orthonormal_basis

_PATCHED = ".attn2"
_LEFT_ALONE = ".attn1"


def node_candidates(
    found: Sequence[Site], skipped: Sequence[SkippedSite], patterns: Sequence[str]
) -> tuple[list[Site], list[SkippedSite]]:
    """The sites that the node patches, and all others with a reason.

    Args:
        found: Sites that can be taken, cross-attention among them.
        skipped: Sites that cannot.
        patterns: Shell patterns of site names; empty for all.

    Raises:
        ExportError: A site that the node would patch cannot be taken: every site moves the state, so that
            leaving one out changes all others.
    """
    for site in skipped:
        wanted = not patterns or any(fnmatch.fnmatchcase(site.name, pattern) for pattern in patterns)
        if wanted and not site.name.endswith(_LEFT_ALONE):
            raise ExportError(
                f"--preset node cannot take the attention site {site.name}: {site.reason}; export the "
                "checkpoint with sws-export, or choose the sites that it can take with --sites"
            )
    sites = [site for site in found if site.key_grid == TEXT and site.name.endswith(_PATCHED)]
    left = [site for site in found if site not in sites]
    reason = "the node leaves self-attention alone"
    return sites, [*skipped, *(SkippedSite(site.name, reason) for site in left)]


def insert_comfyui_node(
    model: ir.Model, sites: Sequence[Site], parameters: SwsParameters, *, debug_outputs: bool
) -> None:
    """Put the node's mathematics into `sites`, in place.

    Raises:
        GraphError: What a site's projections are of cannot be found; the message names the site.
    """
    bases = {widths: orthonormal_basis(*widths).numpy() for widths in sorted(basis_widths(sites))}
    InsertComfyUINode(sites, parameters, bases, debug_outputs)(model)

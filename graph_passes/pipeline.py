"""The passes that make an SWS graph, or a plain one, in the order in which they run."""

from collections.abc import Mapping
from fractions import Fraction

from onnx_ir.passes import InPlacePass, Sequential

from graph_passes.choose_guard import ChooseGuard
from graph_passes.choose_transport import ChooseTransport
from graph_passes.clean_graph import CleanGraph
from graph_passes.decompose_metrics_attention import DecomposeMetricsAttention
from graph_passes.fold_constants import FoldConstants
from graph_passes.lower_functions import LowerFunctions
from graph_passes.match_ranks import MatchRanks
from graph_passes.mix_before_projections import MixBeforeProjections
from graph_passes.name_attention import NameAttention
from graph_passes.pads_to_concats import PadsToConcats
from graph_passes.remove_ordering import RemoveOrdering
from graph_passes.set_static_shapes import SetStaticShapes
from graph_passes.sink_into_branches import SinkIntoBranches
from graph_passes.slices_to_pads import SlicesToPads
from graph_passes.split_query_chunks import SplitQueryChunks
from graph_passes.split_reductions import SplitReductions
from graph_passes.target import Target


def sws_passes(
    target: Target,
    insertion: InPlacePass,
    sizes: Mapping[str, int],
    entropy_rows: Fraction = Fraction(1),
    largest: Mapping[str, int] | None = None,
) -> Sequential:
    """From a plain graph to an SWS graph lowered for `target`.

    A `GraphError` of a pass is the `__cause__` of the `PassError` that the sequence raises.

    Args:
        target: Runtime that the graph is for.
        insertion: Pass of a preset that puts calls of `sws` functions at the selected sites.
        sizes: Static sizes by symbol: `batch`, `height` and `width` of the latent, `tokens`.
        entropy_rows: Share of the query rows that the key guard computes entropies from.
        largest: Largest sizes of dynamic shapes, like `sizes`, as far as they are known.
    """
    return Sequential(
        insertion,
        SetStaticShapes(sizes),
        *([SplitQueryChunks(entropy_rows)] if target.query_chunks else []),
        *([] if target.float32_attention else [DecomposeMetricsAttention()]),
        # Plugins replace the operators for any size. ChooseTransport needs the calls of BandedTransport in
        # the main graph.
        *(
            []
            if target.plugin_operators
            else [
                ChooseGuard({**(largest or {}), **sizes}),
                MixBeforeProjections(),
                LowerFunctions({"BandedTransport"}),
                ChooseTransport(joined=not target.float16_attention),
            ]
        ),
        LowerFunctions(target.plugin_operators),
        FoldConstants(),
        CleanGraph(),
        *([SinkIntoBranches()] if target.branches else []),
        *([] if target.computes_early else [RemoveOrdering()]),
        *([SplitReductions()] if target.slow_reductions else []),
        *([PadsToConcats()] if target.slow_pads else []),
        *([SlicesToPads(), MatchRanks()] if target.costly_shapes else []),
        *([NameAttention()] if target.unscaled_attention else []),
    )


def plain_passes(sizes: Mapping[str, int]) -> Sequential:
    """From a plain graph to one with static `sizes`, without SWS."""
    return Sequential(SetStaticShapes(sizes), FoldConstants(), CleanGraph())

"""The interface of a preset."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from sws_export.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir
    from diffusers import UNet2DConditionModel
    from onnx_ir.passes import InPlacePass
    from torch import Tensor

    from graph_passes.find_sites import Site, SkippedSite
    from graph_passes.insert_sws import StatePair
    from graph_passes.target import Target

    Floats = npt.NDArray[np.floating[Any]]

USource = Literal["sigma", "calls"]


class ReferenceModel(Protocol):
    """A UNet in eager torch with the mathematics of a preset.

    Attributes:
        records: Metrics of each site in the last step, by the path of its module; scalars are [B].
        schedule: Values of the last step that depend on the noise level, among them `kappa`.
    """

    records: dict[str, Any]
    schedule: Any

    def step(
        self,
        sample: "Tensor",
        timestep: "Tensor",
        encoder_hidden_states: "Tensor",
        sigma: "Tensor",
        intensity: "Tensor",
        state: "dict[str, Tensor] | None" = None,
        **unet_inputs: Any,
    ) -> "tuple[Tensor, dict[str, Tensor]]":
        """The prediction of one step, and the state for the next."""


class Preset(abc.ABC):
    """A method that can be inserted into a UNet graph, with everything that depends on the method.

    Attributes:
        name: On the command line and in manifests.
        aliases: Other names that the command line and old manifests may use.
        summary: One line for the help text.
        unused_parameters: Names of parameters without an effect, and why.
        fixed_guard: Why `--guard` and `--guard-rows` have no meaning; None if they have one.
        u: Where the schedule's u comes from: `sigma` (the input), or `calls` (a counter that is a state).
        plain_at_zero: A graph with intensity 0 is the plain UNet, exactly, at every noise level.
        persistent_state: The state persists from image to image; else zeros start each image.
        reset_rule: The same in words, for manifests.
        shared_inputs: Inputs [B] whose first value is used for the whole batch.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str]
    unused_parameters: Mapping[str, str] = {}
    fixed_guard: ClassVar[str | None] = None
    u: USource = "sigma"
    plain_at_zero: ClassVar[bool] = True
    persistent_state: ClassVar[bool] = False
    reset_rule: ClassVar[str] = "feed zeros at the first step of every image"
    shared_inputs: tuple[str, ...] = ()

    def with_u(self, u: str) -> "Preset":
        """The preset with another source of u.

        Raises:
            OptionError: The preset does not have this source.
        """
        raise OptionError(
            f"--u {u} has no meaning with --preset {self.name}: its u is that of sigma; leave it out"
        )

    def check_parameters(self, parameters: SwsParameters) -> None:
        """Raise an error for a parameter that is set and has no effect.

        Raises:
            OptionError: Names the parameter.
        """
        defaults = SwsParameters()
        for name, reason in self.unused_parameters.items():
            if getattr(parameters, name) != getattr(defaults, name):
                raise OptionError(
                    f"--sws {name} has no meaning with --preset {self.name}: {reason}; leave it out"
                )

    def used_parameters(self, parameters: SwsParameters) -> dict[str, Any]:
        """The parameters that have an effect, by name."""
        values = dataclasses.asdict(parameters)
        return {name: value for name, value in values.items() if name not in self.unused_parameters}

    @abc.abstractmethod
    def candidate_sites(
        self, model: "ir.Model", patterns: Sequence[str]
    ) -> "tuple[list[Site], list[SkippedSite]]":
        """The attention sites of a plain graph that the method can be inserted at, and all others.

        Args:
            model: A plain graph.
            patterns: Shell patterns of site names from `--sites`; empty for the default of the preset. The
                sites returned are not yet filtered by them.

        Raises:
            ExportError: The method cannot be inserted at a site that it needs.
        """

    @abc.abstractmethod
    def insertion(
        self,
        sites: "Sequence[Site]",
        parameters: SwsParameters,
        guard: GuardOptions,
        target: "Target",
        *,
        debug_outputs: bool = False,
    ) -> "InPlacePass":
        """The pass that inserts the method at `sites`.

        Args:
            sites: Some of the `candidate_sites`.
            parameters: Constants of the method.
            guard: How the key guard is computed; ignored if `fixed_guard`.
            target: Runtime that the graph is for.
            debug_outputs: Add outputs with the metrics of each site.

        Raises:
            GraphError: A site lacks something that the method needs.
        """

    @abc.abstractmethod
    def reference_unet(
        self,
        unet: "UNet2DConditionModel",
        parameters: SwsParameters,
        sites: Sequence[str],
        kl_strides: tuple[int, int] = (1, 1),
    ) -> ReferenceModel:
        """The eager UNet that graphs are compared with.

        Args:
            unet: The plain UNet, float32 or float64, in evaluation mode.
            parameters: Constants of the method.
            sites: Paths of the attention modules that have SWS.
            kl_strides: See `GuardOptions`; (1, 1) if `fixed_guard`.
        """

    def bypass_sigma(self, parameters: SwsParameters) -> float | None:
        """The only sigma at which a graph with intensity 0 is the plain UNet, exactly.

        None if it is at every sigma (`plain_at_zero`), or at none.
        """
        del parameters
        return None

    def extra_states(self) -> "Sequence[StatePair]":
        """States besides those of the grids."""
        return ()

    @abc.abstractmethod
    def schedule(
        self,
        sigma: "Floats",
        intensity: float,
        parameters: SwsParameters,
        states: "Mapping[str, Floats]",
    ) -> tuple[float, float]:
        """u and the KL budget (nats) of the first sample and site.

        Args:
            sigma: Noise levels, [B].
            intensity: Strength in [0, 1].
            parameters: Constants of the method.
            states: States before the step by the names of their inputs; empty before the first step.
        """

    @abc.abstractmethod
    def banded_state(self, state: "Floats") -> "Floats":
        """The transport of the first sample in a state of the graph, as a band [145, H, W] float32."""

"""What a UNet predicts, and the noise levels that it was trained with."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """What a UNet predicts from a noisy latent x = x0 + sigma · noise, and its noise levels.

    With `edm` and `edm_v_prediction`, the UNet takes log(sigma) / 4 as timestep and
    x / sqrt(sigma² + sigma_data²) as sample, and x0 = c_skip · x + c_out · output with
    c_skip = sigma_data² / (sigma² + sigma_data²) and c_out = sigma · sigma_data / sqrt(sigma² + sigma_data²),
    negative for `edm_v_prediction` (Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1).

    Attributes:
        type: `epsilon`, `v_prediction`, `sample`, `edm` or `edm_v_prediction`.
        source: Where the type is specified, for the log; None if it is assumed.
        sigma_data: Standard deviation of the latents, with `edm` and `edm_v_prediction`.
        sigma_min: Smallest noise level, with `edm` and `edm_v_prediction`.
        sigma_max: Largest noise level, with `edm` and `edm_v_prediction`.
        zero_terminal_snr: Whether the noise schedule ends with pure noise.
        latents_mean: Mean of each channel of the VAE's latents, which the UNet takes normalized.
        latents_std: Standard deviation of each channel.
    """

    type: str
    source: str | None
    sigma_data: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    zero_terminal_snr: bool = False
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def sampling(self) -> dict[str, Any]:
        """The manifest's entry: the attributes that are known besides the type."""
        entry = {
            "sigma_data": self.sigma_data,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "zero_terminal_snr": self.zero_terminal_snr or None,
            "latents_mean": self.latents_mean and list(self.latents_mean),
            "latents_std": self.latents_std and list(self.latents_std),
        }
        return {name: value for name, value in entry.items() if value is not None}

    def remark(self) -> str:
        """One line for the log."""
        source = self.source or "assumed, as nothing specifies it; --prediction-type overrides it"
        zero = ", zero terminal SNR" if self.zero_terminal_snr else ""
        return f"prediction type: {self.type}{zero} ({source})"


# Of the published models: Playground v2.5 and CosXL.
EDM_PREDICTIONS = {
    "edm": Prediction("edm", None, sigma_data=0.5, sigma_min=0.002, sigma_max=80.0),
    "edm_v_prediction": Prediction(
        "edm_v_prediction", None, sigma_data=1.0, sigma_min=0.002, sigma_max=120.0
    ),
}

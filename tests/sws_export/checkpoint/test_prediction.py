"""What a checkpoint specifies about its prediction, from the file, the pipeline and the weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from examples.make_checkpoint import ldm_names
from sws_export.checkpoint import Checkpoint, open_checkpoint
from sws_export.checkpoint.families import FAMILIES
from sws_export.checkpoint.header import Header, read_header
from sws_export.checkpoint.prediction import Prediction
from sws_export.checkpoint.read_prediction import find_prediction
from sws_export.checkpoint.structure import Structure

SD2 = next(family for family in FAMILIES if family.name == "SD 2.x").structure
BIAS = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"


def predicted(
    tmp_path: Path,
    tensors: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    scheduler: dict[str, Any] | None = None,
    given: str | None = None,
    structure: Structure | None = None,
) -> Prediction:
    """The prediction of a file with these tensors and metadata beside the UNet's own."""
    header = Header({}, metadata or {})
    if tensors:
        arrays = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
        save_file(arrays, tmp_path / "x.safetensors", metadata)
        header = read_header(tmp_path / "x.safetensors")
    file = None
    if scheduler is not None:
        file = tmp_path / "scheduler_config.json"
        file.write_text(json.dumps(scheduler))
    return find_prediction(given, file, header, structure, header.tensors)


def test_playground(tmp_path: Path) -> None:
    mean, std = [[[[-1.5]], [[0.5]]]], [[[[8.0]], [[4.0]]]]
    found = predicted(tmp_path, {"edm_mean": mean, "edm_std": std})
    assert (found.type, found.source) == ("edm", "marker tensors edm_mean, edm_std")
    assert found.sampling() == {
        "sigma_data": 0.5,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "latents_mean": [-1.5, 0.5],
        "latents_std": [8.0, 4.0],
    }


def test_cosxl(tmp_path: Path) -> None:
    found = predicted(tmp_path, {"edm_vpred.sigma_max": 100.0, "edm_vpred.sigma_min": 0.25})
    assert (found.type, found.source) == ("edm_v_prediction", "marker tensor edm_vpred.sigma_max")
    assert found.sampling() == {"sigma_data": 1.0, "sigma_min": 0.25, "sigma_max": 100.0}


@pytest.mark.parametrize(("markers", "zero"), [(["v_pred"], False), (["v_pred", "ztsnr"], True)])
def test_v_prediction_markers(markers: list[str], zero: bool, tmp_path: Path) -> None:
    found = predicted(tmp_path, dict.fromkeys(markers, 0.0))
    assert (found.type, found.zero_terminal_snr) == ("v_prediction", zero)
    assert found.sampling() == ({"zero_terminal_snr": True} if zero else {})


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        ({"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}, ("v_prediction", True)),
        ({"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
    ],
)
def test_metadata(metadata: dict[str, str], expected: tuple[str, bool], tmp_path: Path) -> None:
    found = predicted(tmp_path, metadata=metadata)
    assert (found.type, found.zero_terminal_snr) == expected
    assert found.source == "metadata modelspec.prediction_type"


@pytest.mark.parametrize(
    ("scheduler", "expected", "sampling"),
    [
        ({}, "epsilon", {}),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            "v_prediction",
            {"zero_terminal_snr": True},
        ),
        (
            {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 70.0, "sigma_data": 0.5},
            "edm",
            {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 70.0},
        ),
        (
            {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0},
            "edm_v_prediction",
            {"sigma_data": 1.0, "sigma_min": 0.002, "sigma_max": 120.0},
        ),
        (
            # As diffusers writes EulerDiscreteScheduler.
            {"_class_name": "EulerDiscreteScheduler", "sigma_min": None, "sigma_max": None},
            "epsilon",
            {},
        ),
    ],
)
def test_scheduler(
    scheduler: dict[str, Any], expected: str, sampling: dict[str, Any], tmp_path: Path
) -> None:
    found = predicted(tmp_path, {"v_pred": 0.0}, scheduler=scheduler)
    assert (found.type, found.sampling(), found.source) == (expected, sampling, "scheduler_config.json")


@pytest.mark.parametrize(("deviation", "expected"), [(0.05, "epsilon"), (0.15, "v_prediction")])
@pytest.mark.parametrize("name", [BIAS, "output_blocks.11.1.transformer_blocks.0.norm1.bias"])
def test_stable_diffusion_2(deviation: float, expected: str, name: str, tmp_path: Path) -> None:
    bias = np.array([deviation, -deviation])
    found = predicted(tmp_path, {name: bias}, structure=SD2)
    assert found.type == expected
    assert f"as in ComfyUI: deviation {deviation:.3f}" in found.remark()
    assert "--prediction-type" in found.remark()
    assert predicted(tmp_path, {name: bias}, structure=FAMILIES[0].structure).source is None


def test_nothing_specified(tmp_path: Path) -> None:
    found = predicted(tmp_path)
    assert (found.type, found.source, found.sampling()) == ("epsilon", None, {})
    assert found.remark() == (
        "prediction type: epsilon (assumed, as nothing specifies it; --prediction-type overrides it)"
    )


def test_the_option_has_precedence(tmp_path: Path) -> None:
    markers = {"v_pred": 0.0, "ztsnr": 0.0}
    found = predicted(tmp_path, markers, given="epsilon")
    assert (found.type, found.source, found.zero_terminal_snr) == ("epsilon", "--prediction-type", True)
    same = predicted(tmp_path, markers, given="v_prediction")
    assert same.source == "marker v_pred, ztsnr"
    edm = predicted(tmp_path, markers, given="edm")
    assert edm.sampling() == {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}


def test_markers_beside_the_unet(tmp_path: Path, unet_shapes: Any, write_sparse: Any) -> None:
    def opened(extra: dict[str, tuple[int, ...]]) -> Checkpoint:
        config = FAMILIES[0].config()
        shapes = unet_shapes(config)
        names = ldm_names(shapes, config)
        file = tmp_path / "x.safetensors"
        return open_checkpoint(write_sparse(file, {names[name]: shapes[name] for name in shapes} | extra))

    assert opened({"v_pred": ()}).prediction.type == "v_prediction"
    assert opened({"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)}).prediction.type == "edm"
    plain = opened({})
    assert plain.prediction.type == "epsilon"
    assert plain.remarks[-1] == plain.prediction.remark()

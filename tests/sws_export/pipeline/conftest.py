"""A UNet for tests of exports in which the model is not the point."""

from pathlib import Path

import pytest

from tests import export_runs


@pytest.fixture(scope="session")
def middle_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet with attention in its middle block only, which is exported twice as fast as `random_unet`."""
    blocks = {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    return export_runs.shared(
        tmp_path_factory, "middle_unet", lambda path: export_runs.make_unet(path, **blocks)
    )

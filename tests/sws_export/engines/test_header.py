import struct

import pytest

from sws_export.engines.header import plan_header
from sws_export.errors import EngineError


def fake_plan(path, size=64, mask=8 | 16, magic=b"vtrt"):
    head = magic + bytes(4) + b"\2" + bytes(7) + struct.pack("<Q", size) + bytes([1, 7, 1, 116])
    head += b"vtrt" + struct.pack("<I", mask)
    path.write_bytes(head.ljust(64, b"\0"))
    return path


def test_version_size_and_targets_are_read(tmp_path):
    header = plan_header(fake_plan(tmp_path / "engine.plan"))
    assert (header.backend, header.version, header.size) == ("tensorrt-rtx", "1.7.1.116", 64)
    assert header.compute_capabilities == ("8.9", "12.0")


@pytest.mark.parametrize("stated", [63, 65, 2**63])
def test_a_size_that_disagrees_with_the_file_is_damage(tmp_path, stated):
    with pytest.raises(EngineError, match=rf"damaged: its header gives {stated} bytes, the file has 64"):
        plan_header(fake_plan(tmp_path / "engine.plan", size=stated))


def test_a_file_shorter_than_a_header_is_cut_short(tmp_path):
    (tmp_path / "engine.plan").write_bytes(b"vtrt\0\0\0\0")
    with pytest.raises(EngineError, match="truncated: it has 8 bytes"):
        plan_header(tmp_path / "engine.plan")


def test_another_kind_of_file_is_named_by_its_beginning(tmp_path):
    (tmp_path / "engine.plan").write_bytes(b"\x08\x0a\x12\x07pytorch" * 9)
    with pytest.raises(EngineError, match="is not a TensorRT engine: it begins with"):
        plan_header(tmp_path / "engine.plan")


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(EngineError, match=r"cannot read the engine .*No such file"):
        plan_header(tmp_path / "engine.plan")


def test_a_plan_of_tensorrt_has_its_version_only(tmp_path):
    header = plan_header(fake_plan(tmp_path / "engine.plan", magic=b"ftrt", size=1))
    assert (header.backend, header.size, header.compute_capabilities) == ("tensorrt", None, ())

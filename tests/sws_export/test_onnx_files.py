"""ONNX models on disk: small ones in one file, large ones with external data."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sws_export import onnx_files
from sws_export.files import HashedCopy, external_data_path, file_digest
from sws_export.onnx_files import (
    WholeFiles,
    load_onnx,
    release_weights,
    relocate_external_data,
    save_onnx,
    weight_bytes,
)
from sws_export.progress import SilentProgress, Stage
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import SiteSpec, build_model, feeds


class _Counting(SilentProgress):
    """Sums the bytes that are reported as written."""

    def __init__(self) -> None:
        self.total: float | None = None
        self.done = 0.0

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:
        with super().stage(name, total) as stage:
            self.total = total
            stage.advance = self._advance  # type: ignore[method-assign]
            yield stage

    def _advance(self, amount: float = 1.0) -> None:
        self.done += amount


def _external_model(directory: Path) -> ir.Model:
    """A small model with one more weight, which is external data."""
    model = build_model([SiteSpec()])
    array = np.arange(1000, dtype=np.float32)
    source = directory / "weights.bin"
    source.write_bytes(b"head" + array.tobytes())
    shape = ir.Shape(array.shape)
    tensor = ir.ExternalTensor(
        source.name, 4, array.nbytes, ir.DataType.FLOAT, shape=shape, name="extra", base_dir=directory
    )
    value = ir.Value(name="extra", type=ir.TensorType(ir.DataType.FLOAT), shape=shape, const_value=tensor)
    model.graph.register_initializer(value)
    return model


def _check_saved(file: Path, run_onnx: RunOnnx) -> None:
    model = ir.load(file)
    extra = model.graph.initializers["extra"].const_value
    assert extra is not None
    assert extra.numpy().tolist() == list(range(1000))
    expected = run_onnx(build_model([SiteSpec()]), feeds())["out_sample"]
    found = run_onnx(ir.external_data.load_to_model(model), feeds())["out_sample"]
    assert (found == expected).all()


def test_weight_bytes_counts_all_initializers() -> None:
    model = build_model([SiteSpec()])
    arrays = [value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value]
    assert weight_bytes(model) == sum(array.nbytes for array in arrays) > 0


def test_a_small_model_is_one_file(tmp_path: Path, run_onnx: RunOnnx) -> None:
    source = tmp_path / "source"
    source.mkdir()
    out = tmp_path / "out" / "m.onnx"
    out.parent.mkdir()
    assert save_onnx(_external_model(source), out, SilentProgress()) == {out: file_digest(out)}
    assert list(out.parent.iterdir()) == [out]
    (source / "weights.bin").unlink()
    _check_saved(out, run_onnx)


def test_a_large_model_has_external_data(tmp_path: Path, run_onnx: RunOnnx) -> None:
    model = _external_model(tmp_path)
    total = weight_bytes(model)
    progress = _Counting()
    out = tmp_path / "out" / "m.onnx"
    out.parent.mkdir()
    data = external_data_path(out)
    assert save_onnx(model, out, progress, embed_limit=100) == {
        out: file_digest(out),
        data: file_digest(data),
    }
    assert {file.name for file in out.parent.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert str(tmp_path).encode() not in out.read_bytes()
    assert progress.total == total
    assert 0 < progress.done <= total
    (tmp_path / "weights.bin").unlink()
    _check_saved(out.parent.rename(tmp_path / "elsewhere") / "m.onnx", run_onnx)


@pytest.mark.parametrize("limit", [0, 2**20], ids=["beside", "inside"])
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, limit: int) -> None:
    written = []
    for name in ("first", "second"):
        directory = tmp_path / name
        directory.mkdir()
        model = _external_model(tmp_path)
        files = save_onnx(model, directory / "m.onnx", SilentProgress(), embed_limit=limit)
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]


def test_external_data_begins_with_whole_files(tmp_path: Path, run_onnx: RunOnnx) -> None:
    """Of a weight in a file, nothing is written again, whether the file was copied before or not."""
    model = _external_model(tmp_path)
    own = np.arange(500, dtype=np.float32)
    value = ir.Value(name="own", const_value=ir.tensor(own, name="own"))
    model.graph.register_initializer(value)
    source = tmp_path / "weights.bin"
    out = tmp_path / "out" / "m.onnx"
    out.parent.mkdir()
    files = save_onnx(model, out, SilentProgress(), embed_limit=100, whole=WholeFiles((source,)))
    data = external_data_path(out)
    first = data.read_bytes()
    assert first == source.read_bytes() + own.tobytes()
    assert files == {out: file_digest(out), data: file_digest(data)}
    _check_saved(out, run_onnx)

    copy = HashedCopy(data)
    copy.write(memoryview(source.read_bytes()))
    copy.close()
    for _ in range(2):
        # The second time there are other bytes behind the copy.
        again = save_onnx(model, out, SilentProgress(), embed_limit=100, whole=WholeFiles((source,), copy))
        assert again == files
        assert data.read_bytes() == first


def test_a_failed_write_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No such file|not exist"):
        save_onnx(build_model([SiteSpec()]), tmp_path / "missing" / "m.onnx", SilentProgress())


def test_bfloat16_weights_are_saved(tmp_path: Path) -> None:
    import ml_dtypes

    array = np.array([1.0, 2.5, -3.0], ml_dtypes.bfloat16)
    value = ir.Value(
        name="w",
        type=ir.TensorType(ir.DataType.BFLOAT16),
        shape=ir.Shape([3]),
        const_value=ir.tensor(array, name="w"),
    )
    node = ir.node("Identity", [value], name="n")
    node.outputs[0].name, node.outputs[0].type = "y", value.type
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 23}, name="g")
    save_onnx(ir.Model(graph, ir_version=11), tmp_path / "m.onnx", SilentProgress())
    (loaded,) = ir.load(tmp_path / "m.onnx").graph.initializers.values()
    assert loaded.dtype == ir.DataType.BFLOAT16
    assert loaded.const_value is not None
    assert loaded.const_value.tobytes() == array.tobytes()


def test_shared_weights_are_written_once(tmp_path: Path) -> None:
    """Of two equal weights the graphs keep different ones, and the second is stored in its graph."""
    (tmp_path / "source").mkdir()
    general = _external_model(tmp_path / "source")
    model = general.clone()
    large = next(name for name, value in model.graph.initializers.items() if _is_external(value))
    kept = model.graph.initializers[large]
    assert isinstance(kept.const_value, ir.ExternalTensor)
    equal = ir.ExternalTensor(
        kept.const_value.location,
        kept.const_value.offset,
        kept.const_value.length,
        kept.const_value.dtype,
        shape=kept.const_value.shape,
        name=large,
        base_dir=kept.const_value.base_dir,
    )
    out = tmp_path / "out"
    out.mkdir()
    save_onnx(general, out / "general.onnx", SilentProgress(), embed_limit=0)
    size = external_data_path(out / "general.onnx").stat().st_size
    for tensor, inside in ((kept.const_value, False), (equal, True)):
        kept.const_value = tensor
        onnx_files.save_sharing_weights(
            model.clone(), out / "other.onnx", general, out / "general.onnx", SilentProgress()
        )
        assert sorted(file.name for file in out.iterdir()) == [
            "general.onnx",
            "general.onnx.data",
            "other.onnx",
        ]
        assert external_data_path(out / "general.onnx").stat().st_size == size
        found = ir.load(out / "other.onnx").graph.initializers
        assert isinstance(found[large].const_value, ir.ExternalTensor) != inside
        for name, value in general.graph.initializers.items():
            assert value.const_value is not None
            assert found[name].const_value is not None
            np.testing.assert_array_equal(found[name].const_value.numpy(), value.const_value.numpy())


def _is_external(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor)


def test_released_weights_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    np.arange(6, dtype=np.float32).tofile(file)
    shape = ir.Shape([6])
    tensor = ir.ExternalTensor(file.name, 0, 24, ir.DataType.FLOAT, shape=shape, name="w", base_dir=tmp_path)
    value = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=shape, const_value=tensor)
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 23}, name="weights")
    assert tensor.numpy().sum() == 15
    release_weights(ir.Model(graph, ir_version=10))
    assert tensor.raw is None
    assert tensor.numpy().sum() == 15


def test_external_data_is_relocated_to_the_files_behind_links(tmp_path: Path) -> None:
    model = _external_model(tmp_path)
    for number, name in enumerate(("linked.onnx", "linked.data")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / name).symlink_to(tmp_path / str(number) / "blob")
    ir.save(model, tmp_path / "linked.onnx", external_data="linked.data")
    loaded = load_onnx(tmp_path / "linked.onnx")
    assert relocate_external_data(loaded) == tmp_path.resolve() / "1"
    tensor = loaded.graph.initializers["extra"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.location == Path("blob")
    assert tensor.numpy().tolist() == list(range(1000))

"""Model repositories for Triton: the configuration by Triton's own protobuf, the model by Triton itself."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from sws_export.adapters.triton.repository import TritonOptions, write_repository
from sws_export.errors import EngineError, OptionError, OutputError
from sws_export.manifest import tensor_specs
from sws_export.runtime import Session
from sws_export.tensors import Range, SizeRanges, shapes_for
from tests import export_runs

triton = pytest.importorskip("tritonclient.grpc")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

ADDRESS = "127.0.0.1:18731"
TOKENS = 5


@pytest.fixture
def engine(sws_graph: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Make a file with the header of a plan of `tensorrt` or `tensorrt-rtx`, and its manifest."""

    def make(backend: str) -> Path:
        plan = tmp_path / "engine.plan"
        magic = b"vtrt" if backend == "tensorrt-rtx" else b"ftrt"
        plan.write_bytes(magic + bytes(12) + (64).to_bytes(8, "little") + bytes(40))
        document = json.loads(sws_graph.with_name("sws.onnx.json").read_text())
        entry = {
            "name": plan.name,
            "bytes": plan.stat().st_size,
            "sha256": hashlib.sha256(plan.read_bytes()).hexdigest(),
        }
        document |= {"artefact": plan.name, "files": [entry], "engine": {"backend": backend}}
        document["target"] = "tensorrt-rtx"
        sizes = SizeRanges(Range(1, 2, 4), Range(8, 16, 32), Range(8, 24, 32), Range(7, 9, 99))
        document["profile"] = {
            name: dict(zip(("min", "opt", "max"), shapes, strict=True))
            for name, shapes in shapes_for(tensor_specs(document["inputs"]), sizes).items()
        }
        plan.with_name("engine.plan.json").write_text(json.dumps(document))
        return plan

    return make


def read_config(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_native_model(sws_graph: Path, tmp_path: Path) -> None:
    written = write_repository(sws_graph, tmp_path / "models", TritonOptions(name="unet", height=16, width=8))
    folder = tmp_path / "models" / "unet"
    assert written[0] == folder / "config.pbtxt"
    assert names(folder) == ["1/model.onnx", "1/model.onnx.json", "config.pbtxt"]
    assert sorted(str(file.relative_to(folder)) for file in written) == names(folder)
    config = read_config(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("unet", "onnxruntime", 8)
    tensors = {tensor.name: tensor for tensor in config.input}
    assert list(tensors) == ["sample", "timestep", "encoder_hidden_states", "sigma", "intensity"]
    assert list(tensors["sample"].dims) == [4, 16, 8]
    assert list(tensors["encoder_hidden_states"].dims) == [-1, 16]
    # [B] has no dimension beside the batch: Triton requires one, and removes it.
    assert list(tensors["sigma"].dims) == [1]
    assert tensors["sigma"].HasField("reshape")
    assert list(tensors["sigma"].reshape.shape) == []
    assert [tensor.name for tensor in config.output] == ["out_sample"]
    assert config.version_policy.latest.num_versions == 1


def test_site_metrics_are_outputs(metrics_graph: Path, tmp_path: Path) -> None:
    native = TritonOptions(name="native", height=16, width=8)
    python = TritonOptions(name="python", variant="python")
    for options, dims in ((native, ([4], [1])), (python, ([-1, 4], [-1]))):
        write_repository(metrics_graph, tmp_path / "models", options)
        tensors = {
            tensor.name: tensor for tensor in read_config(tmp_path / "models" / options.variant).output
        }
        assert len(tensors) == 8
        assert (tensors["sws_debug_kl"].dims, tensors["sws_debug_kl_cap"].dims) == dims
        assert tensors["sws_debug_kl"].data_type == model_config_pb2.TYPE_FP32


def test_a_state_of_the_text_has_one_number_of_tokens(text_graph: Path, tmp_path: Path) -> None:
    write_repository(text_graph, tmp_path, TritonOptions(height=16, width=8, tokens=77))
    config = read_config(tmp_path / "sws_text")
    image, text = config.sequence_batching.state
    assert (list(image.dims), list(text.dims)) == ([145, 8, 4], [145, 1, 77])
    assert (text.input_name, text.output_name) == ("sws_state_text", "sws_state_text_out")
    assert list(text.initial_state[0].dims) == [145, 1, 77]
    assert text.initial_state[0].zero_data
    tensors = {tensor.name: list(tensor.dims) for tensor in config.input}
    assert tensors["encoder_hidden_states"] == [77, 16]
    with pytest.raises(OptionError, match=r"give height and width \(of the latent\), and the number of"):
        write_repository(text_graph, tmp_path / "models", TritonOptions(height=16, width=8))
    write_repository(text_graph, tmp_path / "models", TritonOptions(variant="python"))


def test_every_state_starts_from_zeros(sws_graph: Path, tmp_path: Path) -> None:
    write_repository(sws_graph, tmp_path, TritonOptions(height=16, width=8, max_sequences=5, idle_seconds=7))
    batching = read_config(tmp_path / "sws").sequence_batching
    assert batching.max_sequence_idle_microseconds == 7_000_000
    assert batching.oldest.max_candidate_sequences == 5
    (state,) = batching.state
    assert (state.input_name, state.output_name) == ("sws_state_d2", "sws_state_d2_out")
    assert list(state.dims) == [145, 8, 4]
    (initial,) = state.initial_state
    assert list(initial.dims) == [145, 8, 4]
    assert initial.zero_data
    assert initial.data_type == state.data_type == model_config_pb2.TYPE_FP32


def test_a_state_that_a_batch_shares_is_not_batched(node_graph: Path, tmp_path: Path) -> None:
    write_repository(node_graph, tmp_path, TritonOptions(name="node", tokens=77, max_sequences=5))
    config = read_config(tmp_path / "node")
    assert config.max_batch_size == 0
    assert [list(tensor.dims) for tensor in config.input] == [[-1, 4, -1, -1], [-1], [-1, 77, 16], [-1], [-1]]
    assert [list(tensor.dims) for tensor in config.output[:2]] == [[-1, 4, -1, -1], [-1, 4]]
    batching = config.sequence_batching
    assert batching.oldest.max_candidate_sequences == 5
    assert not batching.oldest.preferred_batch_size
    (state,) = batching.state
    assert (state.input_name, state.output_name) == ("sws_state_text", "sws_state_text_out")
    assert list(state.dims) == list(state.initial_state[0].dims) == [1, 77, 77]
    assert state.initial_state[0].zero_data


def test_what_a_shared_state_forbids(node_graph: Path, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="a static one for each state: give the number of text tokens, or use"
    ):
        write_repository(node_graph, tmp_path)
    with pytest.raises(OptionError, match=r"max_batch 4 has no effect for node\.onnx"):
        write_repository(node_graph, tmp_path, TritonOptions(tokens=77, max_batch=4))
    assert not list(tmp_path.iterdir())


def test_plain_models_have_no_sequences(traced: Path, tmp_path: Path) -> None:
    write_repository(traced, tmp_path, TritonOptions(name="plain", height=16, width=8))
    config = read_config(tmp_path / "plain")
    assert not config.HasField("sequence_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000


def test_engine_takes_sizes_from_its_profile(engine: Callable[[str], Path], tmp_path: Path) -> None:
    write_repository(engine("tensorrt"), tmp_path / "models")
    folder = tmp_path / "models" / "engine"
    assert names(folder) == ["1/model.plan", "1/model.plan.json", "config.pbtxt"]
    config = read_config(folder)
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)
    assert list(config.sequence_batching.state[0].dims) == [145, 8, 12]
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU


def test_weights_beside_the_graph_keep_their_name(sws_graph: Path, tmp_path: Path) -> None:
    for file in (sws_graph, sws_graph.with_name("sws.onnx.json")):
        shutil.copy(file, tmp_path / file.name.replace("sws", "large"))
    (tmp_path / "large.onnx.data").write_bytes(b"weights")
    manifest = tmp_path / "large.onnx.json"
    document = json.loads(manifest.read_text().replace('"sws.onnx"', '"large.onnx"'))
    digest = hashlib.sha256(b"weights").hexdigest()
    document["files"].append({"name": "large.onnx.data", "bytes": 7, "sha256": digest})
    manifest.write_text(json.dumps(document))
    write_repository(tmp_path / "large.onnx", tmp_path / "models", TritonOptions(height=8, width=8))
    assert "1/large.onnx.data" in names(tmp_path / "models" / "large")


def test_python_model(sws_graph: Path, tmp_path: Path) -> None:
    write_repository(sws_graph, tmp_path, TritonOptions(variant="python", max_sequences=3))
    assert names(tmp_path / "sws") == ["1/model.onnx", "1/model.onnx.json", "1/model.py", "config.pbtxt"]
    config = read_config(tmp_path / "sws")
    assert (config.backend, config.max_batch_size) == ("python", 0)
    assert list(config.input[0].dims) == [-1, 4, -1, -1]
    controls = {entry.name: entry.control[0].kind for entry in config.sequence_batching.control_input}
    kinds = model_config_pb2.ModelSequenceBatching.Control
    assert controls == {
        "START": kinds.CONTROL_SEQUENCE_START,
        "END": kinds.CONTROL_SEQUENCE_END,
        "CORRID": kinds.CONTROL_SEQUENCE_CORRID,
    }
    assert config.parameters["max_sequences"].string_value == "3"


def test_a_model_that_is_there_already(sws_graph: Path, tmp_path: Path) -> None:
    options = TritonOptions(height=8, width=8)
    write_repository(sws_graph, tmp_path, options)
    before = export_runs.listing(tmp_path)
    with pytest.raises(OutputError, match="exists already; remove it, or choose another name"):
        write_repository(sws_graph, tmp_path, options)
    assert export_runs.listing(tmp_path) == before


def test_what_triton_cannot_serve(sws_graph: Path, engine: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot run engine\.plan, an engine of TensorRT for RTX"):
        write_repository(engine("tensorrt-rtx"), tmp_path / "models")
    with pytest.raises(OptionError, match=r"has dynamic shapes, and Triton needs.*give height and width"):
        write_repository(sws_graph, tmp_path / "models")
    with pytest.raises(OptionError, match="width 64 is outside the engine's profile, 8 to 32"):
        write_repository(engine("tensorrt"), tmp_path / "models", TritonOptions(width=64))
    with pytest.raises(OptionError, match="tokens 6 is outside the engine's profile, 7 to 99"):
        write_repository(engine("tensorrt"), tmp_path / "models", TritonOptions(tokens=6))
    with pytest.raises(OptionError, match="max_batch 5 is above the largest batch of the artefact, 4"):
        write_repository(engine("tensorrt"), tmp_path / "models", TritonOptions(max_batch=5))
    assert not (tmp_path / "models" / "engine").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name 'a/b': expected letters"),
        ({"variant": "ruby"}, "variant 'ruby' is unknown"),
        ({"max_batch": 0}, "max_batch 0 is out of range"),
        (
            {"variant": "python", "height": 64},
            "height has no meaning with the variant 'python'; leave it out",
        ),
        ({"variant": "python", "max_batch": 2}, "max_batch has no meaning with the variant 'python'"),
        ({"engine_host_code_allowed": True}, "engine_host_code_allowed has no meaning with the variant 'nat"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TritonOptions(**change)


def make_inputs(sequence: int, step: int, batch: int = 1) -> dict[str, Any]:
    random = np.random.default_rng((sequence, step))
    return {
        "sample": random.standard_normal((batch, 4, 8, 6), np.float32),
        "timestep": np.full(batch, 900.0 - 100 * step, np.float32),
        "encoder_hidden_states": random.standard_normal((batch, TOKENS, 16), np.float32),
        "sigma": np.full(batch, 9.0 / (step + 1), np.float32),
        "intensity": np.full(batch, 1.0, np.float32),
    }


@pytest.fixture(scope="session")
def triton_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's server and its Python backend out of nvidia-pytriton, which is not installed for it."""
    folder = tmp_path_factory.mktemp("triton")
    fetched = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, "nvidia-pytriton==0.7.0"],
        capture_output=True,
        text=True,
        check=False,
    )
    if fetched.returncode:
        pytest.skip(f"nvidia-pytriton cannot be had here: {fetched.stderr[-300:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    server = folder / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "backends" / "python" / "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / version / stub.name, stub)
    for program in (stub, server / "bin" / "tritonserver"):
        program.chmod(0o755)
    return server


@pytest.fixture
def served(triton_folder: Path, sws_graph: Path, tmp_path: Path) -> Iterator[Any]:
    """A client of a server on this machine alone that serves the model `unet` in Python."""
    repository = tmp_path / "models"
    write_repository(sws_graph, repository, TritonOptions(name="unet", variant="python", max_sequences=2))
    log = tmp_path / "triton.log"
    host, port = ADDRESS.split(":")
    command = [triton_folder / "bin" / "tritonserver", "--model-repository", repository]
    command += ["--backend-directory", triton_folder / "backends", "--allow-http=false"]
    command += ["--allow-metrics=false", "--exit-timeout-secs=1", "--grpc-address", host, "--grpc-port", port]
    paths = [str(export_runs.ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        )
    client = triton.InferenceServerClient(ADDRESS)
    try:
        for _ in range(300):
            try:
                if client.is_model_ready("unet"):
                    break
            except triton.InferenceServerException:
                assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield client
    finally:
        client.close()
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def ask(client: Any, sequence: int, given: dict[str, Any], **flags: bool) -> Any:
    tensors = []
    for name, array in given.items():
        tensors.append(triton.InferInput(name, array.shape, "FP32"))
        tensors[-1].set_data_from_numpy(array)
    return client.infer("unet", tensors, sequence_id=sequence, **flags).as_numpy("out_sample")


@pytest.mark.slow
def test_two_sequences_at_a_real_server(served: Any, sws_graph: Path) -> None:
    """Interleaved steps give what two sessions give, and a new start forgets."""
    session = Session.load(sws_graph)
    streams = {7: session.stream(), 9: session.stream()}
    for step in range(4):
        for sequence, stream in streams.items():
            given = make_inputs(sequence, step, batch=2)
            found = ask(served, sequence, given, sequence_start=step == 0, sequence_end=step == 3)
            np.testing.assert_allclose(found, stream.step(**given), rtol=0, atol=1e-6)
    given = make_inputs(7, 0)
    for _ in range(2):
        found = ask(served, 7, given, sequence_start=True)
        np.testing.assert_allclose(found, session.stream().step(**given), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_errors_reach_the_client(served: Any) -> None:
    given = make_inputs(1, 0) | {"intensity": np.full(1, 2.0, np.float32)}
    with pytest.raises(triton.InferenceServerException, match="intensity: expected 0 to 1, found 2"):
        ask(served, 3, given, sequence_start=True)

"""Models of the Hugging Face Hub: from the local cache, or downloaded into it."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sws_export.checkpoint.config import read_json
from sws_export.checkpoint.locate import Location, choose_weights, locate, unet_folders, variant_of
from sws_export.checkpoint.schemas import ShardIndex
from sws_export.errors import CheckpointError
from sws_export.progress import Progress

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_FILE_SUFFIXES = {".safetensors", ".json", ".onnx", ".gguf", ".ckpt", ".bin", ".pt", ".pth", ".pkl"}
# What the UNet's weights alone do not specify; a few kilobytes.
_PIPELINE_FILES = ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json")


@dataclass(frozen=True)
class HubModel:
    """A model in the local cache of the Hub.

    Attributes:
        repo: Name of the repository, such as `stabilityai/sdxl-turbo`.
        commit: Commit of the files.
        directory: The directory with its files.
        remarks: Notes for the user.
    """

    repo: str
    commit: str
    directory: Path
    remarks: tuple[str, ...]


def is_hub_id(model: Path) -> bool:
    """Whether `model` is no path on this machine and has the form REPOSITORY or REPOSITORY@REVISION.

    A path whose first directory exists is a misspelt path.
    """
    if model.exists() or model.is_symlink() or model.suffix.lower() in _FILE_SUFFIXES:
        return False
    return bool(_HUB_ID.fullmatch(model.as_posix())) and not Path(model.parts[0]).exists()


def fetch_hub_model(model: Path, variant: str | None, *, ema: bool, progress: Progress) -> HubModel:
    """The UNet of a repository, its configuration and those of scheduler and VAE.

    The cache is used if it has the UNet, without a connection. Otherwise the files are downloaded by
    huggingface_hub, which shows its progress bars.

    Args:
        model: REPOSITORY or REPOSITORY@REVISION.
        variant: Variant of the weights, as in `locate`.
        ema: Take `unet_ema`, as in `locate`.
        progress: Receives what is downloaded.

    Raises:
        CheckpointError: The repository has no UNet, or it is not in the cache and cannot be downloaded.
    """
    match = _HUB_ID.fullmatch(model.as_posix())
    assert match is not None
    repo, revision = match["repo"], match["revision"] or "main"
    cached = _cached(repo, revision, variant, ema)
    if cached is not None and _is_complete(cached, variant):
        return HubModel(repo, cached.directory.name, cached.directory, (f"{repo}: from the local cache",))
    try:
        directory = _download(repo, revision, variant, ema, progress)
    except _Unreachable as error:
        if cached is None:
            raise CheckpointError(
                f"{model.as_posix()} does not exist here, is not in the Hugging Face cache and cannot be "
                f"downloaded: {error}; connect to the network, or give the path of a model"
            ) from error
        remark = f"{repo}: from the local cache, which is not complete; it cannot be downloaded: {error}"
        return HubModel(repo, cached.directory.name, cached.directory, (remark,))
    return HubModel(repo, directory.name, directory, (f"{repo}: commit {directory.name}",))


@dataclass(frozen=True)
class _Cached:
    directory: Path
    location: Location


class _Unreachable(Exception):  # noqa: N818  (control flow inside this module, never an error)
    """Why the Hub cannot be reached."""


def _cached(repo: str, revision: str, variant: str | None, ema: bool) -> _Cached | None:
    """The snapshot in the cache, if it has a UNet.

    Raises:
        CheckpointError: Repositories cannot have this name.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # Without patterns every file of the repository would have to be in the cache.
        directory = Path(snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True))
        return _Cached(directory, locate(directory, variant, ema=ema))
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo} does not exist here, and is no name of a repository of the Hugging Face Hub: "
            f"{_reason(error)}"
        ) from error
    except (LocalEntryNotFoundError, CheckpointError):
        return None


def _is_complete(cached: _Cached, variant: str | None) -> bool:
    """Whether a download would not add or change anything."""
    weights = cached.location.index or cached.location.weights[0]
    if variant is None and variant_of(weights.name):
        return False
    if cached.location.config is None and variant_of(weights.name) is not None:
        # A file in the original layout has no configuration, one in diffusers' layout has.
        return False
    pipeline = cached.location.pipeline
    return pipeline is None or all((pipeline / name).is_file() for name in _PIPELINE_FILES)


def _download(repo: str, revision: str, variant: str | None, ema: bool, progress: Progress) -> Path:
    """Download what an export needs; returns the directory with the files.

    Raises:
        CheckpointError: The repository or revision does not exist, or has no UNet.
        _Unreachable: There is no connection.
    """
    directory, names = _listing(repo, revision)
    chosen = _choose(repo, directory, names, variant, ema)
    progress.log(f"downloading {repo}: {', '.join(chosen)}")
    _fetch(repo, directory.name, chosen)
    for name in chosen:
        if name.endswith(".json") and ".index." in name:
            _fetch(repo, directory.name, _shards(directory / name, PurePosixPath(name).parent))
    return directory


def _listing(repo: str, revision: str) -> tuple[Path, list[str]]:
    """The snapshot's directory, with the configurations, and the names of all files of the repository."""
    from huggingface_hub import HfApi

    directory = _fetch(
        repo, revision, [*_PIPELINE_FILES, "config.json", "unet/config.json", "unet_ema/config.json"]
    )
    try:
        return directory, HfApi().list_repo_files(repo, revision=directory.name)
    except Exception as error:  # errors of httpx, whose name depends on the version of huggingface_hub
        raise _Unreachable(_reason(error)) from error


def _choose(repo: str, directory: Path, names: list[str], variant: str | None, ema: bool) -> list[str]:
    """The weights or their index."""
    for folder in unet_folders(ema=ema):
        inside = [PurePosixPath(name) for name in names]
        files = sorted(path.name for path in inside if path.parent == PurePosixPath(folder))
        try:
            found = choose_weights(files, variant, f"{repo}/{folder}".rstrip("/"))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; or download one of them") from error
        if found is not None:
            return [str(PurePosixPath(folder, found.name))]
    try:
        locate(directory, variant, ema=ema)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(directory), repo)) from error
    raise CheckpointError(f"{repo} contains no UNet with safetensors weights")


def _shards(index: Path, folder: PurePosixPath) -> list[str]:
    """The files that a shard index names, as names in the repository."""
    return sorted({str(folder / name) for name in read_json(index, ShardIndex)["weight_map"].values()})


def _fetch(repo: str, revision: str, names: list[str]) -> Path:
    """Download these files of the repository, those that exist."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=names))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} on the Hugging Face Hub is gated: accept its conditions on its page, then log in with "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo} does not exist here, and the Hugging Face Hub has no such repository, or it is private; "
            "check the name, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} on the Hugging Face Hub has no revision '{revision}'") from error
    except LocalEntryNotFoundError as error:
        raise _Unreachable(_reason(error.__cause__ or error)) from error
    except Exception as error:  # errors of httpx, whose name depends on the version of huggingface_hub
        raise _Unreachable(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """The first line of the message, without advice about options that sws-export does not have."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""Where artefacts are found and written."""

from pathlib import Path

import folder_paths

FOLDER = "sws"
SUFFIXES = {".onnx", ".plan", ".engine"}
_SHARED = "tensorrt"


def register() -> None:
    """Add `models/sws` and `models/tensorrt` to the folders of `extra_model_paths.yaml`.

    ComfyUI registers the folders of that file before it loads nodes, without suffixes, which would list
    every file.
    """
    known = folder_paths.folder_names_and_paths
    paths, suffixes = known.get(FOLDER, ([], set()))
    models = Path(folder_paths.models_dir)
    others = list(known[_SHARED][0]) if _SHARED in known else []
    wanted = [*paths, str(models / FOLDER), *others, str(models / _SHARED)]
    known[FOLDER] = (list(dict.fromkeys(wanted)), set(suffixes) | SUFFIXES)


def artefacts() -> list[str]:
    """Names of all artefacts; files without a manifest are those of other programs."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if _is_ours(name)]


def path_of(name: str) -> Path:
    """The file of an artefact; raises FileNotFoundError."""
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def output_folder() -> Path:
    """Where new artefacts are written: the first folder; it is created."""
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_ours(name: str) -> bool:
    path = folder_paths.get_full_path(FOLDER, name)
    return path is not None and Path(f"{path}.json").is_file()


register()

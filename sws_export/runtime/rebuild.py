"""The command that builds an engine again for a size outside its profile."""

from sws_export.runtime.contract import Contract
from sws_export.tensors import SIZE_AXES, TensorSpec


def rebuild_command(contract: Contract, spec: TensorSpec, axis: int, found: int) -> str:
    """The export command of an engine with its profile extended to include a size.

    Args:
        contract: Of an engine.
        spec: The input outside the profile.
        axis: Its dimension outside the profile.
        found: Size of that dimension.
    """
    profile = contract.profile or {}
    source = contract.manifest["source"]
    name, _, divisor = str(spec.shape[axis]).partition("/")
    wanted = found * int(divisor or 1)
    options = []
    for size, (tensor, place) in SIZE_AXES.items():
        if tensor not in profile:
            continue
        low, best, high = (shape[place] for shape in profile[tensor])
        if size == name:
            low, high = min(low, wanted), max(high, wanted)
        scale = (source.get("vae_scale") or 1) if size in ("height", "width") else 1
        options.append(f"--{size} {low * scale}:{best * scale}:{high * scale}")
    return f"sws-export {source['file']} --out {contract.path.name} {' '.join(options)}"

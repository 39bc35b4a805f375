"""The parameters of a layer with a LoRA or a related adaptation, in float32.

W is the weight of a linear layer, [out, in], or of a convolution, [out, in, height, width]. The differences
of low-rank adaptations are multiplied by alpha / rank. The formulas are those of LyCORIS and PEFT:

LoRA and LoCon   W + up · down                          https://arxiv.org/abs/2106.09685
LoHa             W + (w1_a · w1_b) ⊙ (w2_a · w2_b)      https://arxiv.org/abs/2108.06098
LoKr             W + w1 ⊗ w2                            https://arxiv.org/abs/2309.14859
GLoRA            W + W · a1 · a2 + b1 · b2              https://arxiv.org/abs/2306.07967
DoRA             magnitude · V / norm(V), V the weight with one of the above
                                                        https://arxiv.org/abs/2402.09353
(IA)³            the rows or columns of W scaled        https://arxiv.org/abs/2205.05638
OFT and BOFT     W rotated in blocks of its rows        https://arxiv.org/abs/2306.07280, 2311.06243

https://github.com/KohakuBlueleaf/LyCORIS, https://github.com/huggingface/peft.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sws_export.lora.layer import LoraLayer

Shape = tuple[int, ...]


def changes_weight(lora: LoraLayer) -> bool:
    """Whether the adaptation changes the weight of its layer."""
    return any(role in lora for roles in _WEIGHT_KINDS for role in roles)


def changes_bias(lora: LoraLayer) -> bool:
    """Whether the adaptation changes the bias of its layer."""
    scales = "ia3_l" in lora and not _scales_input(lora)
    return scales or any(role in lora for role in ("bias_difference", "up_bias", "new_bias"))


def adapted_weight(parameter: Tensor, lora: LoraLayer, scale: float) -> Tensor:
    """The weight of a layer with an adaptation of strength `scale`.

    Raises:
        KeyError: A tensor of the adaptation is missing; the argument is its role.
        RuntimeError: The shapes do not match the weight's.
    """
    for roles, function in _WEIGHT_KINDS.items():
        if any(role in lora for role in roles):
            parameter = function(parameter, lora, scale)
    return parameter


def adapted_bias(parameter: Tensor, lora: LoraLayer, scale: float) -> Tensor:
    """The bias of a layer with an adaptation of strength `scale`; raises as `adapted_weight` does."""
    shape = parameter.shape
    if "bias_difference" in lora:
        parameter = parameter + scale * lora["bias_difference"].reshape(shape)
    if "up_bias" in lora:
        parameter = parameter + scale * lora.factor(lora["down"].shape[0]) * lora["up_bias"].reshape(shape)
    if "new_bias" in lora:
        parameter = torch.lerp(parameter, lora["new_bias"].reshape(shape), scale)
    if "ia3_l" in lora and not _scales_input(lora):
        parameter = parameter * (1 + scale * (lora["ia3_l"].reshape(shape) - 1))
    return parameter


def _lora(lora: LoraLayer, shape: Shape) -> tuple[Tensor, int]:  # noqa: ARG001
    up, down = lora["up"], lora["down"]
    if "mid" in lora:
        return _tucker(lora["mid"], up.flatten(1).T, down.flatten(1)), down.shape[0]
    return up.flatten(1) @ down.flatten(1), down.shape[0]


def _loha(lora: LoraLayer, shape: Shape) -> tuple[Tensor, int]:  # noqa: ARG001
    factors = []
    for number in ("1", "2"):
        a, b = lora[f"hada_w{number}_a"], lora[f"hada_w{number}_b"]
        tucker = f"hada_t{number}" in lora
        factors.append(_tucker(lora[f"hada_t{number}"], a, b) if tucker else a @ b.flatten(1))
    return factors[0] * factors[1], lora["hada_w1_b"].shape[0]


def _lokr(lora: LoraLayer, shape: Shape) -> tuple[Tensor, int]:
    rank = 0
    factors = []
    for number in ("1", "2"):
        if f"lokr_w{number}" in lora:
            factors.append(lora[f"lokr_w{number}"])
            continue
        a, b = lora[f"lokr_w{number}_a"], lora[f"lokr_w{number}_b"]
        rank = rank or b.shape[0]
        tucker = f"lokr_t{number}" in lora
        factors.append(_tucker(lora[f"lokr_t{number}"], a, b) if tucker else a @ b.flatten(1))
    first, second = factors
    product = torch.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second)
    return product.reshape(shape), rank


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[out, in, height, width] from the core [rank, rank, height, width], a [rank, out] and b [rank, in]."""
    product: Tensor = torch.einsum("mnhw,mo,ni->oihw", core, a, b)
    return product.contiguous()


def _low_rank(
    difference: Callable[[LoraLayer, Shape], tuple[Tensor, int]],
) -> Callable[[Tensor, LoraLayer, float], Tensor]:
    """The weight with `difference`, which returns the change of the weight and its rank, 0 for a full one."""

    def adapted(weight: Tensor, lora: LoraLayer, scale: float) -> Tensor:
        change, rank = difference(lora, tuple(weight.shape))
        if change.shape[0] != weight.shape[0]:
            raise RuntimeError(f"a change of {list(change.shape)} for a weight of {list(weight.shape)}")
        # LyCORIS stores a meaningless alpha for a LoKr of full rank; PEFT scales it.
        factor = lora.factor(rank or 1) if rank or lora.peft else 1.0
        change = factor * change.reshape(weight.shape)
        if "magnitude" in lora:
            return _decomposed(weight + scale * change, lora["magnitude"].flatten())
        if "dora_scale" in lora:
            return torch.lerp(weight, _decomposed(weight + change, lora["dora_scale"]), scale)
        return weight + scale * change

    return adapted


def _decomposed(direction: Tensor, magnitude: Tensor) -> Tensor:
    """`direction` with the norms `magnitude`: one of each output, [out, 1, ...], or input, [1, in, ...]."""
    if magnitude.ndim == 1:
        magnitude = magnitude.reshape(-1, *(1,) * (direction.ndim - 1))
    kept = 0 if magnitude.shape[0] == direction.shape[0] else 1
    others = [dim for dim in range(direction.ndim) if dim != kept]
    norm: Tensor = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    return direction * (magnitude / norm)


def _glora(weight: Tensor, lora: LoraLayer, scale: float) -> Tensor:
    a1, a2, b1, b2 = (lora[role].flatten(1) for role in ("a1", "a2", "b1", "b2"))
    if b1.shape[0] != weight.shape[0]:
        # Files of LyCORIS before version 2 have the matrices in the reverse order.
        a1, a2, b1, b2 = a2, a1, b2, b1
    change = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2) + (b1 @ b2).reshape(weight.shape)
    return weight + scale * lora.factor(a2.shape[0]) * change


def _ia3_of_lycoris(weight: Tensor, lora: LoraLayer, scale: float) -> Tensor:
    dim = 1 if bool(lora["on_input"]) else 0
    return weight * (1 + scale * _along(weight, lora["new_weight"], dim))


def _ia3_of_peft(weight: Tensor, lora: LoraLayer, scale: float) -> Tensor:
    dim = 1 if _scales_input(lora) else 0
    return weight * (1 + scale * (_along(weight, lora["ia3_l"], dim) - 1))


def _scales_input(lora: LoraLayer) -> bool:
    return lora.peft is not None and lora.peft.is_feedforward(lora.name)


def _along(weight: Tensor, vector: Tensor, dim: int) -> Tensor:
    """`vector` in the shape that broadcasts along dimension `dim` of `weight`."""
    shape = [1] * weight.ndim
    shape[dim] = weight.shape[dim]
    return vector.reshape(shape)


def _oft(weight: Tensor, lora: LoraLayer, scale: float) -> Tensor:
    """OFT with blocks [number, size, size], or BOFT with [factors, number, size, size]."""
    blocks = lora["oft_blocks"]
    skew = blocks - blocks.transpose(-1, -2)
    constraint = lora.constraint() * weight.shape[0]
    if constraint > 0:
        skew = skew * (constraint / (skew.norm() + 1e-8)).clamp(max=1)
    identity = torch.eye(skew.shape[-1], device=skew.device)
    rotations = (identity + skew) @ torch.linalg.inv(identity - skew)
    rotated = weight
    if blocks.ndim == 3:
        rows = weight.reshape(*blocks.shape[:2], *weight.shape[1:])
        rotated = torch.einsum("knm,kn...->km...", rotations, rows).reshape(weight.shape)
    else:
        for index, rotation in enumerate(rotations):
            rotated = _butterfly(rotated, rotation, stride=2**index * (blocks.shape[-1] // 2))
    if "rescale" in lora:
        rotated = _along(weight, lora["rescale"], 0) * rotated
    return torch.lerp(weight, rotated, scale)


def _butterfly(weight: Tensor, rotation: Tensor, stride: int) -> Tensor:
    """Rotate blocks of rows that are `stride` rows apart."""
    rest = weight.shape[1:]
    blocks = weight.reshape(-1, 2, stride, *rest).transpose(1, 2).reshape(*rotation.shape[:2], *rest)
    rotated: Tensor = torch.einsum("bij,bj...->bi...", rotation, blocks)
    return rotated.reshape(-1, stride, 2, *rest).transpose(1, 2).reshape(weight.shape)


def _oft_of_peft(weight: Tensor, lora: LoraLayer, scale: float) -> Tensor:
    """OFT on the inputs of a layer; `oft_R`: upper triangles of the blocks, [number, size · (size-1)/2]."""
    options = lora.peft.content if lora.peft is not None else {}
    triangles = lora["oft_R"]
    size = round((1 + (1 + 8 * triangles.shape[1]) ** 0.5) / 2)
    rows, columns = torch.triu_indices(size, size, 1, device=triangles.device)
    skew = triangles.new_zeros(triangles.shape[0], size, size)
    skew[:, rows, columns] = triangles
    skew = skew - skew.transpose(1, 2)
    identity = torch.eye(size, device=skew.device)
    if options.get("use_cayley_neumann", True):
        rotations = _neumann_series(identity, skew, options.get("num_cayley_neumann_terms", 5))
    else:
        rotations = (identity - skew) @ torch.linalg.inv(identity + skew)
    # A single block is shared by all inputs.
    inputs = weight.reshape(weight.shape[0], -1, size)
    rotated = torch.einsum("rij,orj->ori", rotations.expand(inputs.shape[1], size, size), inputs)
    return torch.lerp(weight, rotated.reshape(weight.shape), scale)


def _neumann_series(identity: Tensor, skew: Tensor, terms: int) -> Tensor:
    """The first terms of (I + skew) · (I - skew)⁻¹ = I + 2 skew + 2 skew² + ..., as PEFT computes them.

    PEFT does not double the last term, and computes three terms as four.
    """
    degree = max(terms - 1, 3) if terms > 2 else terms - 1
    result, power = identity.expand_as(skew), skew
    for exponent in range(1, degree + 1):
        result = result + (1 if exponent == degree and degree > 2 else 2) * power
        power = power @ skew
    return result


def _difference(weight: Tensor, lora: LoraLayer, scale: float) -> Tensor:
    return weight + scale * lora["weight_difference"].reshape(weight.shape)


def _replacement(weight: Tensor, lora: LoraLayer, scale: float) -> Tensor:
    if "on_input" in lora:
        return weight
    return torch.lerp(weight, lora["new_weight"].reshape(weight.shape), scale)


_WEIGHT_KINDS: dict[tuple[str, ...], Callable[[Tensor, LoraLayer, float], Tensor]] = {
    ("new_weight",): _replacement,
    ("up", "down"): _low_rank(_lora),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"): _low_rank(_loha),
    ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"): _low_rank(_lokr),
    ("a1", "a2", "b1", "b2"): _glora,
    ("on_input",): _ia3_of_lycoris,
    ("ia3_l",): _ia3_of_peft,
    ("oft_blocks",): _oft,
    ("oft_R",): _oft_of_peft,
    ("weight_difference",): _difference,
}

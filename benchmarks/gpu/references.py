"""References for the kernels in plain torch, for any dtype and device."""

import math

import torch

SearchInputs = list[torch.Tensor]


def diamond(radius: int) -> list[tuple[int, int]]:
    """Offsets (dy, dx) with |dy| + |dx| <= radius, ordered by dy, then dx."""
    reach = range(-radius, radius + 1)
    return [(dy, dx) for dy in reach for dx in reach if abs(dy) + abs(dx) <= radius]


def dense_transport(weights: torch.Tensor, radius: int) -> torch.Tensor:
    """The [B, T, T] matrix of a banded transport [B, K, H, W]; entries that leave the grid are dropped."""
    batch, _, height, width = weights.shape
    device = weights.device
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    dense = weights.new_zeros(batch, height * width, height * width)
    for index, (dy, dx) in enumerate(diamond(radius)):
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        rows = (y * width + x)[inside]
        columns = ((y + dy) * width + x + dx)[inside]
        dense[:, rows, columns] = weights[:, index][:, inside]
    return dense


def make_weights(batch: int, side: tuple[int, int], radius: int, device: str, seed: int = 0) -> torch.Tensor:
    """A random banded transport whose rows sum to one."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    weights = torch.rand(batch, len(diamond(radius)), *side, generator=generator)
    return (weights / weights.sum(1, keepdim=True)).to(device)


def gather_kernel(radius: int, device: str) -> torch.Tensor:
    """One-hot convolution kernels [K, 1, 2 R + 1, 2 R + 1] that move each entry of a band to its target."""
    side = 2 * radius + 1
    offsets = diamond(radius)
    kernel = torch.zeros(len(offsets), 1, side, side)
    for index, (dy, dx) in enumerate(offsets):
        kernel[index, 0, radius + dy, radius + dx] = 1
    return kernel.to(device)


def rebalance_band(band: torch.Tensor, gather: torch.Tensor, rounds: int) -> torch.Tensor:
    """Rows, then columns, of a banded transport [B, K, H, W] divided by their sums, `rounds` times.

    As in the exported graph, convolutions with `gather_kernel(radius)` move the band to its targets and back.
    """
    radius = gather.shape[-1] // 2
    for _ in range(rounds):
        band = band / band.sum(1, keepdim=True).clamp_min(1e-8)
        columns = torch.nn.functional.conv_transpose2d(band, gather, padding=radius)
        band = band / torch.nn.functional.conv2d(columns.clamp_min(1e-8), gather, padding=radius).clamp_min(
            1e-8
        )
    return band


def split_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, h * D] as [B, h, T, D]."""
    batch, tokens, channels = tensor.shape
    return tensor.view(batch, tokens, heads, channels // heads).transpose(1, 2)


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """One site of the unchanged model: torch's fused attention."""
    queries, keys, values = (split_heads(x, heads) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
    return out.transpose(1, 2).flatten(2)


def site_amplitude(entropy: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
    """a [B]: `amplitude` [B] times the entropy factor of the entropies [B, h * T]."""
    low, high = entropy.amin(1), entropy.amax(1)
    hu = ((entropy.mean(1) - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return (amplitude * hu).clamp(0, 1)


def literal_guard(
    q: torch.Tensor,
    k: torch.Tensor,
    k_perm: torch.Tensor,
    scalars: SearchInputs,
    heads: int,
    *,
    key_cap: float = 0.3,
    bisection_steps: int = 7,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """alpha_k and a_v by definition: materialized logits in `dtype`, a softmax per bisection step."""
    tau_q, amplitude, kappa, key_gate, value_gain = (x.to(dtype) for x in scalars)
    queries = split_heads(q, heads).to(dtype) / tau_q.view(-1, 1, 1, 1)
    scale = 1 / math.sqrt(queries.shape[-1])
    base = queries @ split_heads(k, heads).to(dtype).transpose(-1, -2) * scale
    delta = queries @ split_heads(k_perm, heads).to(dtype).transpose(-1, -2) * scale - base
    log_a0 = torch.log_softmax(base, -1)
    entropy = -(log_a0.exp() * log_a0).nan_to_num().sum(-1).flatten(1)
    a = site_amplitude(entropy, amplitude)
    below, above = torch.zeros_like(a), key_cap * a
    for _ in range(bisection_steps):
        middle = (below + above) / 2
        log_a = torch.log_softmax(base + middle.view(-1, 1, 1, 1) * delta, -1)
        kl = (log_a.exp() * (log_a - log_a0)).sum(-1).flatten(1).mean(1)
        within = kl <= kappa
        below, above = torch.where(within, middle, below), torch.where(within, above, middle)
    return [(key_gate * below).float(), (value_gain * a).clamp(0, 1).float()]


def make_guard_inputs(
    batch: int,
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    device: str,
    *,
    sharpness: float = 1.0,
    kappa: float = 0.05,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SearchInputs]:
    """q, k, k_perm and the scalars of a realistic site: smoothed keys, rows of different sharpness."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    k = torch.randn(batch, tokens, channels, generator=generator)
    k_perm = (k + k.roll(1, 1) + k.roll(-1, 1)) / 3
    q = torch.randn(batch, tokens, channels, generator=generator)
    q = q * torch.linspace(0.2, 1.5, tokens).view(1, -1, 1) * sharpness
    scalars = [1.2, 0.5, kappa, 1.0, 0.5]
    tensors = [x.to(device=device, dtype=dtype) for x in (q, k, k_perm)]
    return (*tensors, [torch.full((batch,), value, device=device) for value in scalars])  # type: ignore[return-value]


def one_hot_guard_inputs(
    size: float, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SearchInputs]:
    """A site in which most queries attend to one key, by a logit of `size`; k_perm has the keys reordered.

    The weights of such rows under k and under k_perm share no key, so sums relative to two peaks underflow.
    """
    tokens = 48
    k = torch.eye(tokens).unsqueeze(0)
    q = k * size * math.sqrt(tokens)
    q[:, ::3] *= 2 / size  # flat rows, so that the entropies differ
    k_perm = k.roll(7, 1)
    scalars = [1.0, 1.0, 5.0, 1.0, 0.5]
    tensors = [x.to(device=device, dtype=dtype) for x in (q, k, k_perm)]
    return (*tensors, [torch.full((1,), value, device=device) for value in scalars])  # type: ignore[return-value]

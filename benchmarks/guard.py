"""Accuracy and cost of the forms of the key guard: missed steps, 16-bit products, sampled query rows.

    python benchmarks/guard.py --model examples/shapes/unet --out benchmarks/results/guard.json

`steps`: queries with log-normal lengths of a given spread; the number of samples with a binding budget in
which each fused form ends at another step of 128 than the literal form.
`products`: by how many steps the result moves if queries and mixed keys are rounded to 16 bit before each
product, with float32 or wider accumulation.
`float16`: the guard of the GPU targets with fused float16 attention emulated (materialized float32 logits at
256 tokens): by how many steps of 128 it misses the exact one, and the error of its entropy factor. Rows of
five kinds at up to five budgets each (those of the default schedule, or ones that bind), and the model's own
queries and keys along a sampling.
`float32`: the same for a float32 model, from materialized logits (TensorRT for RTX) and from attention whose
operands are pairs of float16.
`cost`: CPU time of a site of 64 x 64 tokens, 8 heads of 40 channels, in ONNX Runtime without the cost of the
transport, relative to its plain attention.
`rows`: error of the entropy factor from an eighth of the rows, for the model's own queries and keys during
sampling; with the lattice alone, and with the longest and the shortest query of each head.
`kl_rows`: error of the prediction over five steps if the KL divergence is that of an eighth of the rows
(`--guard-rows kl:1/8`), relative to its largest value; the eager reference in float64.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from graph_passes.guard import GuardForm

HEADS, SIZE, TOKENS, SEEDS = 2, 16, 64, 20
BUDGETS = (0.09, 0.02, 0.003)
Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_tokens(seed: int, spread: float) -> Tokens:
    """Queries, keys and transported keys of two samples, [2, T, C]."""
    rng = np.random.default_rng(seed)
    q, k, e = (rng.standard_normal((2, TOKENS, HEADS * SIZE), dtype=np.float32) for _ in range(3))
    k_perm = 0.5 * k + 0.3 * np.roll(k, 1, axis=1) + 0.1 * e
    lengths = np.exp(np.random.default_rng(seed).normal(0, spread, q.shape[:2]))
    return q * lengths[..., None].astype(np.float32), k, k_perm.astype(np.float32)


def guard_steps(form: "GuardForm", target: str = "onnxruntime") -> Callable[[Tokens, float], np.ndarray]:
    """The key guard with key_cap 1 as a function (tokens, budget) -> steps [2]."""
    import onnx_ir as ir

    from graph_passes.functions import build_functions
    from graph_passes.guard import GuardOptions
    from graph_passes.parameters import SwsParameters
    from graph_passes.target import TARGETS
    from tests.graph_passes.functions.calls import Call

    parameters = SwsParameters(key_cap=1.0)
    call = Call(
        build_functions(parameters, ir.DataType.FLOAT, TARGETS[target], GuardOptions(form)),
        "KeyGuard",
        {name: ["batch", "tokens", HEADS * SIZE] for name in ("q", "k", "k_perm")},
        ir.DataType.FLOAT,
        {"num_heads": HEADS, "scale": SIZE**-0.5},
    )
    ones = dict.fromkeys(("tau_q", "amplitude", "key_gate", "value_gain"), np.ones(2, np.float32))

    def run(tokens: Tokens, budget: float) -> np.ndarray:
        named = dict(zip(("q", "k", "k_perm"), tokens, strict=True))
        alpha, mix = call(**named, **ones, kappa=np.full(2, budget, np.float32))
        return np.rint(alpha / mix * 128)

    return run


def count_missed(spread: float, budget: float) -> dict[str, Any]:
    """Number of samples with a binding budget; per fused form the number missed and the largest miss."""
    literal = guard_steps("literal")
    found = {
        "branches": guard_steps("fused"),
        "three nodes, float32": guard_steps("fused", "tensorrt"),
    }
    row: dict[str, Any] = {"spread": spread, "budget": budget, "binding": 0}
    row |= {name: {"missed": 0, "by": 0} for name in found}
    for seed in range(SEEDS):
        tokens = random_tokens(seed, spread)
        expected = literal(tokens, budget)
        binds = expected < 127
        row["binding"] += int(binds.sum())
        for name, guard in found.items():
            off = np.abs(guard(tokens, budget) - expected)[binds]
            row[name]["missed"] += int((off > 0).sum())
            row[name]["by"] = max(row[name]["by"], int(off.max(initial=0)))
    return row


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` rounded to a 16-bit dtype, as float64."""
    import torch

    return torch.from_numpy(np.asarray(x, np.float32)).to(getattr(torch, dtype)).double().numpy()


def moved_by_products(dtype: str, spread: float, budget: float) -> dict[str, Any]:
    """By how many steps rounding of the operands moves the result; inputs are rounded to `dtype`."""
    from graph_passes.parameters import SwsParameters
    from tests.graph_passes.functions.oracle import Oracle

    moved = []
    for seed in range(SEEDS):
        q, k, k_perm = (rounded(x[0], dtype) for x in random_tokens(seed, spread))
        exact = Oracle(q, k, k_perm, HEADS, 1.3)
        mix = exact.entropy_factor()
        expected = exact.largest_step(mix, budget, SwsParameters(key_cap=1.0))
        if expected == 127:
            continue
        narrow_q = rounded(q / 1.3, dtype)
        low, high = 0, 128
        while high - low > 1:
            middle = (low + high) // 2
            keys = rounded(k + mix * middle / 128 * (k_perm - k), dtype)
            within = Oracle(narrow_q, k, keys, HEADS, 1.0).divergence(1.0) <= budget
            low, high = (middle, high) if within else (low, middle)
        moved.append(abs(low - expected))
    result = {"dtype": dtype, "spread": spread, "budget": budget, "binding": len(moved)}
    return result | {"mean": float(np.mean(moved)), "largest": int(max(moved))} if moved else result


def queries_and_keys(model: Path, side: int) -> list[tuple[int, np.ndarray, np.ndarray, float]]:
    """Heads, queries and keys [B, T, C] of every self-attention layer during one sampling run, and sigma."""
    import torch
    from diffusers import DDIMScheduler

    from sws_export.checkpoint import open_checkpoint
    from sws_export.checkpoint.unet_module import load_unet

    unet = load_unet(open_checkpoint(model), torch.float32)
    found = []
    sigma = 0.0

    def record(module: Any, positional: Any, named: Any) -> None:
        x = positional[0] if positional else named["hidden_states"]
        found.append((module.heads, module.to_q(x).numpy(), module.to_k(x).numpy(), sigma))

    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(record, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, unet.config.in_channels, side, side, generator=generator)
    text = torch.randn(2, 16, unet.config.cross_attention_dim, generator=generator)
    scheduler = DDIMScheduler.from_pretrained(model.parent / "scheduler")
    scheduler.set_timesteps(12)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            kept = float(scheduler.alphas_cumprod[int(timestep)])
            sigma = ((1 - kept) / kept) ** 0.5
            noise = unet(latent, timestep, encoder_hidden_states=text).sample
            latent = scheduler.step(noise, timestep, latent).prev_sample
    return found


def errors_of_rows(model: Path, side: int) -> list[dict[str, Any]]:
    """RMS and largest error of the entropy factor from an eighth of the rows, per grid."""
    from tests.graph_passes.functions.oracle import Oracle

    errors: dict[int, dict[str, list[float]]] = {}
    for heads, queries, keys, _ in queries_and_keys(model, side):
        tokens = queries.shape[1]
        width = int(tokens**0.5)
        lattice = np.arange(tokens).reshape(width, width)[1::4, 1::2].ravel()
        for q, k in zip(queries, keys, strict=True):
            oracle = Oracle(q, k, k, heads, 1.0)
            entropy = oracle.entropy()
            lengths = np.linalg.norm(q.reshape(tokens, heads, -1), axis=2)
            extremes = [entropy[np.arange(heads), pick(lengths, axis=0)] for pick in (np.argmax, np.argmin)]
            some = entropy[:, lattice]
            with_extremes = np.concatenate([some, np.stack(extremes, 1)], 1)
            for name, seen in (("lattice", some), ("lattice and extremes", with_extremes)):
                factor = (seen.mean() - seen.min()) / np.ptp(seen)
                rows = errors.setdefault(tokens, {}).setdefault(name, [])
                rows.append(float(factor - oracle.entropy_factor()))
    return [
        {
            "tokens": tokens,
            **{
                name: {"rms": float(np.sqrt(np.mean(np.square(rows)))), "largest": float(np.abs(rows).max())}
                for name, rows in by_name.items()
            },
        }
        for tokens, by_name in sorted(errors.items())
    ]


def emulated_guard(
    heads: int, size: int, dtype: str, tokens: int, target: str = "tensorrt-rtx", *, pairs: bool = False
) -> Any:
    """The `KeyGuard` of a GPU target in the reference evaluator, with fused float16 attention emulated.

    With `pairs` float32 attention has pairs of float16 as operands.
    """
    import onnx_ir as ir

    from graph_passes.choose_guard import MATERIALIZED_TOKENS
    from graph_passes.functions import MATERIALIZED_LOGITS, build_functions
    from graph_passes.guard import GuardOptions
    from graph_passes.parameters import SwsParameters
    from graph_passes.target import TARGETS
    from tests.graph_passes.functions.calls import Call
    from tests.graph_passes.functions.fused_attention import Attention, Emulation, PairAttention

    model_dtype = ir.DataType[dtype.upper().replace("FLOAT32", "FLOAT")]
    functions = build_functions(SwsParameters(), model_dtype, TARGETS[target], GuardOptions("fused"))
    shapes = {name: ["batch", name, heads * size] for name in ("q", "k", "k_perm")}
    attributes = {"num_heads": heads, "scale": size**-0.5}
    stored = tokens <= MATERIALIZED_TOKENS and dtype != "float32"
    name = f"KeyGuard.{MATERIALIZED_LOGITS}" if stored else "KeyGuard"
    model = Call(functions, name, shapes, ir.DataType.FLOAT, attributes).model
    return Emulation(model, PairAttention if pairs else Attention)


def miss_of_float16(
    guard: Any, tokens: Tokens, heads: int, dtype: str, tau_q: float, amplitude: float, budgets: list[float]
) -> list[tuple[int, float]]:
    """Steps missed, and error of the entropy factor, of one sample at each budget.

    Budgets that do not bind under the cap are replaced by shares of the divergence at the last step.
    """
    import ml_dtypes

    from graph_passes.parameters import SwsParameters
    from tests.graph_passes.functions.oracle import Oracle

    narrow = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    q, k, k_perm = (x.astype(narrow) for x in tokens)
    exact = Oracle(*(x.astype(np.float64) for x in (q, k, k_perm)), heads, tau_q)
    factor = exact.entropy_factor()
    scalars = {"tau_q": tau_q, "amplitude": amplitude, "key_gate": 1, "value_gain": 1}
    named = {name: np.array([value], np.float32) for name, value in scalars.items()}
    # One sample, and a budget that is broadcast: the budget changes nothing but the last comparison.
    kappa = np.array(budgets, np.float32)
    alpha, mix = guard(q=q[None], k=k[None], k_perm=k_perm[None], kappa=kappa, **named)
    error = abs(float(mix[0]) / amplitude - factor)
    steps = np.rint(alpha / max(0.3 * float(mix[0]) / 128, 1e-30))
    exact_steps = [exact.largest_step(amplitude * factor, budget, SwsParameters()) for budget in budgets]
    return [(int(step) - right, error) for step, right in zip(steps, exact_steps, strict=True)]


def misses_of_kinds() -> list[dict[str, Any]]:
    """`miss_of_float16` for rows of five kinds, at sizes of SD1.5 and SDXL.

    Each site has up to 1152 query rows, and the curvature of K' is the mean over about 800 of all heads (900
    to 1000 at the largest sites of SD1.5 and SDXL).
    """
    results = []
    for dtype in ("float16", "bfloat16"):
        for side, heads, size in ((16, 4, 80), (24, 4, 80), (32, 4, 64), (64, 2, 40), (64, 2, 64)):
            guard = emulated_guard(heads, size, dtype, side**2)
            results += _misses_at_a_size(guard, side, heads, size, dtype)
    return results


def misses_of_float32() -> list[dict[str, Any]]:
    """As `misses_of_kinds`, for a float32 model: materialized float32 logits, and pairs of float16."""
    results = []
    for side, heads, size in ((32, 4, 64), (64, 2, 40)):
        for form, target in (("materialized logits", "tensorrt-rtx"), ("float16 pairs", "onnxruntime-cuda")):
            pairs = form == "float16 pairs"
            guard = emulated_guard(heads, size, "float32", side**2, target, pairs=pairs)
            found = _misses_at_a_size(guard, side, heads, size, "float32")
            results += [row | {"form": form} for row in found]
    return results + costs_of_float32()


def costs_of_float32() -> list[dict[str, Any]]:
    """Modelled seconds and bytes of the guard of one float32 site of 64 x 64 tokens, batch 2."""
    from benchmarks.rtx_model import GPUS

    results: list[dict[str, Any]] = []
    for heads, size in ((8, 40), (10, 64)):
        rows = 2 * heads * 4096
        logits = rows * 4096
        # Written by a product, read and written by the softmax, read by a product.
        stored = {
            gpu: 4 * (4 * logits * size / rates.float32 + 4 * 4 * logits / rates.bandwidth)
            for gpu, rates in GPUS.items()
        }
        # Queries and keys have 3 D channels, values 2 D and zeros: the widths must be equal.
        pairs = {gpu: 4 * 2 * logits * 6 * size / rates.attention for gpu, rates in GPUS.items()}
        site = {"site": f"64 x 64, {heads} x {size}, batch 2"}
        results += [
            site | {"form": "materialized logits", "seconds": stored, "bytes": 2 * 4 * logits},
            site | {"form": "float16 pairs", "seconds": pairs, "bytes": 4 * 2 * 3 * size * rows},
        ]
    return results


def _misses_at_a_size(guard: Any, side: int, heads: int, size: int, dtype: str) -> list[dict[str, Any]]:
    from graph_passes.parameters import SwsParameters
    from tests.graph_passes.functions.oracle import Oracle
    from tests.graph_passes.functions.rows import KINDS, site_rows

    results = []
    for kind in KINDS:
        tokens = site_rows(kind, side, side, heads, size, 0, min(1152, side**2))
        oracle = Oracle(*tokens, heads, 1.37)
        budgets = oracle.binding_budgets(oracle.entropy_factor(), SwsParameters())
        found = miss_of_float16(guard, tokens, heads, dtype, 1.37, 1.0, budgets)
        results.append(_summary(found) | {"rows": kind, "tokens": side**2, "size": size, "dtype": dtype})
    return results


def misses_along_a_sampling(model: Path) -> list[dict[str, Any]]:
    """`miss_of_float16` for the queries and keys of the model at its own budgets, where keys are mixed."""
    import torch

    from graph_passes.parameters import SwsParameters
    from sws_export.reference import schedule
    from sws_export.reference.transport import blended_transport

    parameters, side = SwsParameters(), 64
    guards: dict[tuple[int, int], Any] = {}
    found: list[tuple[int, float]] = []
    for heads, queries, keys, sigma in queries_and_keys(model, side):
        tokens, width = queries.shape[1], round(queries.shape[1] ** 0.5)
        values = schedule(torch.tensor([sigma], dtype=torch.float64), torch.ones(1), parameters)
        if tokens <= 256 or float(values.u) >= parameters.u_stop or float(values.w) == 0:
            continue
        transport = blended_transport(values.u, width, width, parameters)[0].numpy()
        size = queries.shape[2] // heads
        if (heads, size) not in guards:
            guards[heads, size] = emulated_guard(heads, size, "float16", tokens)
        sample = (queries[0], keys[0], (transport @ keys[0]).astype(np.float32))
        found += miss_of_float16(
            guards[heads, size],
            sample,
            heads,
            "float16",
            float(values.tau_q),
            float(values.w),
            [float(values.kappa), 1e-3],
        )
    return [
        _summary(found) | {"rows": "the example's own, along a sampling", "tokens": 1024, "dtype": "float16"}
    ]


def _summary(found: list[tuple[int, float]]) -> dict[str, Any]:
    missed = [abs(step) for step, _ in found]
    return {
        "cases": len(found),
        "missed": sum(step > 0 for step in missed),
        "by_at_most": max(missed),
        "entropy_factor_error": max(error for _, error in found),
    }


def site_costs() -> list[dict[str, Any]]:
    """CPU time of one site for each kind of step."""
    import onnx_ir as ir

    from graph_passes.functions import build_functions
    from graph_passes.functions.building import define_function
    from graph_passes.guard import GuardOptions
    from graph_passes.parameters import SwsParameters
    from graph_passes.target import TARGETS
    from tests.graph_passes.functions.calls import Call

    heads, channels, dtype = 8, 320, ir.DataType.FLOAT
    tokens = ["batch", "tokens", channels]
    shapes = {"q": tokens, "k": tokens, "v": tokens}

    def plain(op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, q_num_heads=heads, kv_num_heads=heads)

    def site(rows: str) -> Any:
        guard = GuardOptions.parse("fused", rows)
        functions = build_functions(SwsParameters(), dtype, TARGETS["onnxruntime"], guard)
        functions["BandedTransport"] = define_function(
            "BandedTransport",
            lambda op, transport, k, v: (op.Mul(k, 0.7), op.Mul(v, 0.7)),  # noqa: ARG005
            {"transport": dtype, "k": dtype, "v": dtype},
            ["k_perm", "v_perm"],
            [ir.Attr(name, ir.AttributeType.INT, None) for name in ("radius", "tensors")],
        )
        with_band = shapes | {"transport": ["batch", 145, "height", "width"]}
        attributes = {"num_heads": heads, "scale": (channels / heads) ** -0.5}
        return Call(functions, "Attention", with_band, dtype, attributes)

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 4096, channels), dtype=np.float32) for _ in range(3))

    def inputs(logits: float, amplitude: float, kappa: float = 0.05, key_gate: float = 1.0) -> dict[str, Any]:
        scalars = {"tau_q": 1.2, "amplitude": amplitude, "kappa": kappa, "key_gate": key_gate}
        named = {name: np.array([x], np.float32) for name, x in (scalars | {"value_gain": 0.5}).items()}
        return named | {"q": logits * q, "k": k, "v": v, "transport": np.zeros((1, 145, 64, 64), np.float32)}

    plain_call = Call(
        {"Plain": define_function("Plain", plain, dict.fromkeys("qkv", dtype), ["y"])},
        "Plain",
        shapes,
        dtype,
        {},
    )
    every, some, kl = (site(rows) for rows in ("1", "1/8", "kl:1/8"))
    steps: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (plain_call, {"q": q, "k": k, "v": v}),
        "no amplitude": (every, inputs(2, 0.0)),
        "keys not mixed": (every, inputs(2, 0.5, key_gate=0)),
        "bound": (every, inputs(1, 0.05)),
        "one evaluation": (every, inputs(2, 0.5)),
        "binding": (every, inputs(3, 1.0, 0.0005)),
        "rows 1/8, bound": (some, inputs(1, 0.05)),
        "rows 1/8, one evaluation": (some, inputs(2, 0.5)),
        "rows 1/8, binding": (some, inputs(3, 1.0, 0.0005)),
        "rows kl:1/8, one evaluation": (kl, inputs(2, 0.5)),
        "rows kl:1/8, binding": (kl, inputs(3, 1.0, 0.0005)),
    }
    seconds = dict.fromkeys(steps, float("inf"))
    for _ in range(3):
        for name, (call, feed) in steps.items():
            begin = time.process_time()
            call(**feed)
            seconds[name] = min(seconds[name], time.process_time() - begin)
    return [
        {
            "step": name,
            "cpu_seconds": seconds[name],
            "times_plain": seconds[name] / seconds["plain"],
            "attentions": call.executed(**feed)["Attention"],
        }
        for name, (call, feed) in steps.items()
    ]


def errors_of_kl_rows(model: Path) -> list[dict[str, Any]]:
    """Largest error of the prediction with an eighth of the rows for the KL divergence.

    At the default budgets, and at one that binds. `alpha_k_moved` is the share of the sites and samples whose
    key mixing is another one, of the step with most of them.
    """
    import torch

    from graph_passes.debug_outputs import PREFIX
    from graph_passes.guard import GuardOptions
    from graph_passes.parameters import SwsParameters
    from sws_export.checkpoint import open_checkpoint
    from sws_export.checkpoint.unet_io import unet_inputs
    from sws_export.checkpoint.unet_module import load_unet
    from sws_export.reference import self_attention_sites
    from sws_export.validation import SwsSpec
    from sws_export.validation.reference_runner import ReferenceRunner
    from sws_export.validation.trajectory import Trajectory

    checkpoint = open_checkpoint(model)
    sites = tuple(site.path for site in self_attention_sites(load_unet(checkpoint, torch.float32)))
    results = []
    for side in (32, 64):
        for budget in (None, 1e-3):
            parameters = SwsParameters() if budget is None else SwsParameters(kl_floor=budget, kl_slope=0.0)
            sizes = {"batch": 2, "height": side, "width": side, "tokens": 16}
            trajectory = Trajectory(unet_inputs(checkpoint.config, "float32"), sizes, 5)
            runners = [
                ReferenceRunner(
                    checkpoint,
                    None,
                    SwsSpec(parameters, sites, GuardOptions.parse("fused", rows), debug_sites=sites),
                    trajectory.intensity,
                    float64=True,
                )
                for rows in ("1", "kl:1/8")
            ]
            errors, moved = [], []
            for step in trajectory.steps():
                inputs = trajectory.inputs(step)
                exact, some = (runner.step(inputs, step.sigma) for runner in runners)
                largest = np.abs(exact["out_sample"]).max()
                errors.append(float(np.abs(some["out_sample"] - exact["out_sample"]).max() / largest))
                shares = [outputs[f"{PREFIX}alpha_k"] for outputs in (some, exact)]
                moved.append(float(np.mean(shares[0] != shares[1])))
                trajectory.advance(step, exact["out_sample"])
            results.append(
                {"side": side, "budget": budget, "largest": max(errors), "alpha_k_moved": max(moved)}
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy and cost of the forms of the key guard.")
    parser.add_argument("--model", type=Path, required=True, help="UNet directory with a scheduler beside it")
    parser.add_argument("--out", type=Path, help="JSON file; results of other parts are kept")
    parts = ["cost", "steps", "products", "float16", "float32", "rows", "kl_rows"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    measure = {
        "cost": site_costs,
        "steps": lambda: [count_missed(spread, b) for spread in (1.0, 1.5, 2.0, 3.0) for b in BUDGETS],
        "products": lambda: [
            moved_by_products(dtype, spread, budget)
            for dtype in ("float16", "bfloat16")
            for spread in (0.5, 1.5)
            for budget in BUDGETS
        ],
        "float16": lambda: [*misses_along_a_sampling(arguments.model), *misses_of_kinds()],
        "float32": misses_of_float32,
        "kl_rows": lambda: errors_of_kl_rows(arguments.model),
        "rows": lambda: [row for side in (32, 64) for row in errors_of_rows(arguments.model, side)],
    }
    results = {}
    if arguments.out and arguments.out.exists():
        results = json.loads(arguments.out.read_text("utf-8"))
    for name in arguments.only:
        results[name] = measure[name]()
        print(name)
        for row in results[name]:
            print("  ", row, flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

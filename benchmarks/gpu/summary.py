"""Overheads computed from the timings, and whether the goals are met."""

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.sizes import SiteGroup

TRANSPORT_GOAL_MICROSECONDS = 40.0  # 64 x 64, batch 2, keys and values
GUARD_GOAL = 1.3  # times one SDPA of the same site
STEP_GOALS = {"SD1.5": 0.15, "SDXL": 0.18}  # of a whole plain step


def band_flops(site: SiteGroup) -> float:
    """Floating-point operations of the transport for keys and values."""
    return 2 * 145 * 2 * site.batch * site.tokens * site.channels


def band_bytes(site: SiteGroup) -> float:
    """Lower bound of bytes moved: P once, keys and values in and out, 16 bit."""
    return 145 * 4 * site.batch * site.tokens + 4 * 2 * site.batch * site.tokens * site.channels


def summarize(
    sites: Sequence[SiteGroup],
    timings: list[dict[str, Any]],
    state_updates: dict[str, float],
    steps: dict[str, float | str],
    bandwidth: float,
    rate: float,
) -> dict[str, Any]:
    """The summary of a results file; timings of sites may be missing.

    Args:
        sites: What the run was to time.
        timings: Records of `SiteTimings`.
        state_updates: Microseconds of a new transport of a grid, by the name of a site on it.
        steps: Microseconds of a plain UNet step for each model, or a reason.
        bandwidth: Bytes a second of a large copy.
        rate: Operations a second of a large bfloat16 product.
    """
    by_name = {timing["site"]: timing for timing in timings}
    rows = [
        _summarize_site(site, by_name[site.name], bandwidth, rate) for site in sites if site.name in by_name
    ]
    by_model = {model: [site for site in sites if site.model == model] for model in STEP_GOALS}
    models = [
        _summarize_model(model, its_sites, by_name, state_updates, steps.get(model, "not measured"))
        for model, its_sites in by_model.items()
        if all(site.name in by_name for site in its_sites)
    ]
    return {"sites": rows, "models": models, "goals": _goals(sites, rows, models, by_name)}


def _summarize_site(site: SiteGroup, timing: dict[str, Any], bandwidth: float, rate: float) -> dict[str, Any]:
    bound = max(band_bytes(site) / bandwidth, band_flops(site) / rate) * 1e6
    return {
        "site": site.name,
        "transport_fraction_of_bound": bound / timing["transport"],
        "transport_speedup_over_dense": timing["dense_matmul"] / timing["transport"],
        "guard_over_attention": timing["guard"] / timing["attention"],
        "fused_guard_over_attention": timing["fused_guard"] / timing["attention"],
        "overhead_of_attention": _added(timing) / timing["attention"],
    }


def _added(timing: dict[str, Any]) -> float:
    """Microseconds that the operators and the mixing add to a site."""
    return float(timing["transport"] + timing["guard"] + timing["mix"])


def _summarize_model(
    model: str,
    sites: Sequence[SiteGroup],
    by_name: dict[str, dict[str, Any]],
    state_updates: dict[str, float],
    step: float | str,
) -> dict[str, Any]:
    # Each grid has one entry in the sites of a model.
    states = sum(state_updates[site.name] for site in sites)
    added = states + sum(site.count * _added(by_name[site.name]) for site in sites)
    attention = sum(site.count * by_name[site.name]["attention"] for site in sites)
    fused = sum(site.count * by_name[site.name]["fused_guard"] for site in sites)
    measured = isinstance(step, int | float)
    return {
        "model": model,
        "added_microseconds": added,
        "state_microseconds": states,
        "attention_microseconds": attention,
        "overhead_of_attention": added / attention,
        "step_microseconds": step,
        "overhead_of_step": added / step if measured else None,
        # What the cost model of the engines predicts for the GPU lowering.
        "fused_guard_microseconds": fused,
        "fused_guard_of_step": fused / step if measured else None,
    }


def _goals(
    sites: Sequence[SiteGroup],
    rows: list[dict[str, Any]],
    models: list[dict[str, Any]],
    by_name: dict[str, dict[str, Any]],
) -> dict[str, bool | None]:
    largest = [site.name for site in sites if site.side == 64]
    transports = [by_name[name]["transport"] for name in largest if name in by_name]
    guards = [row["guard_over_attention"] <= GUARD_GOAL for row in rows]
    goals: dict[str, bool | None] = {
        f"transport at 64x64 <= {TRANSPORT_GOAL_MICROSECONDS:.0f} us": (
            all(time <= TRANSPORT_GOAL_MICROSECONDS for time in transports)
            if largest and len(transports) == len(largest)
            else None
        ),
        f"guard <= {GUARD_GOAL} attention at every site": all(guards) if len(guards) == len(sites) else None,
    }
    overheads = {model["model"]: model["overhead_of_step"] for model in models}
    for model, goal in STEP_GOALS.items():
        overhead = overheads.get(model)
        goals[f"{model} step <= {1 + goal:.2f} plain"] = None if overhead is None else overhead <= goal
    return goals


def as_markdown(results: dict[str, Any]) -> str:
    """The summary as Markdown tables."""
    lines = [
        f"{results['device']}, torch {results['torch']}, CUDA {results['cuda']}; float16, batch 2.",
        "Times in microseconds.",
        "",
        "| site | transport | dense matmul | copy | mix | guard | guard, binding budget | fused guard "
        "| literal guard | attention | guard / attention | fused guard / attention |",
        "|---" * 12 + "|",
    ]
    for timing, site in zip(results["timings"], results["summary"]["sites"], strict=True):
        names = ("transport", "dense_matmul", "copy_same_bytes", "mix", "guard", "guard_tight_budget")
        cells = [f"{timing[name]:.1f}" for name in (*names, "fused_guard")]
        cells.append("-" if timing["literal_guard"] is None else f"{timing['literal_guard']:.0f}")
        cells.append(f"{timing['attention']:.1f}")
        cells += [f"{site[name]:.2f}" for name in ("guard_over_attention", "fused_guard_over_attention")]
        lines.append(f"| {timing['site']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| model | added | plain attention | plain step | added, % of step | fused guards, % of step |",
        "|---" * 6 + "|",
    ]
    for model in results["summary"]["models"]:
        step, overhead = model["step_microseconds"], model["overhead_of_step"]
        cells = [f"{model[name]:.0f}" for name in ("added_microseconds", "attention_microseconds")]
        if overhead is None:
            cells += [str(step), "-", "-"]
        else:
            cells += [f"{step:.0f}", f"{100 * overhead:.1f}", f"{100 * model['fused_guard_of_step']:.1f}"]
        lines.append(f"| {model['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

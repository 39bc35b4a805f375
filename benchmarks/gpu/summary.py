"""Overheads computed from the timings, and whether the goals are met."""

from typing import Any

from benchmarks.gpu.sites import SITES, Site

TRANSPORT_GOAL_MICROSECONDS = 60.0  # SD1.5, 64 x 64, batch 2, keys and values
BOUND_GOAL = 0.70
GUARD_GOAL = 1.3  # times one SDPA of the same site
STEP_GOAL = 0.15  # of a whole UNet step


def band_flops(site: Site) -> float:
    """Floating-point operations of the transport for keys and values."""
    return 2 * 145 * 2 * site.batch * site.tokens * site.channels


def band_bytes(site: Site) -> float:
    """Lower bound of bytes moved: P once, keys and values in and out, 16 bit."""
    return 145 * 4 * site.batch * site.tokens + 4 * 2 * site.batch * site.tokens * site.channels


def summarize(
    timings: list[dict[str, Any]],
    state_updates: dict[str, float],
    steps: dict[str, float | str],
    bandwidth: float,
    rate: float,
) -> dict[str, Any]:
    """The summary of a results file; sites may be missing.

    Args:
        timings: Records of `SiteTimings`.
        state_updates: Microseconds of a new transport of a grid, by the name of a site on it.
        steps: Microseconds of a plain UNet step for each model, or a reason.
        bandwidth: Bytes a second of a large copy.
        rate: Operations a second of a large bfloat16 product.
    """
    by_name = {timing["site"]: timing for timing in timings}
    measured = [site for site in SITES if site.name in by_name]
    sites = [_summarize_site(site, by_name[site.name], bandwidth, rate) for site in measured]
    models = [
        _summarize_model(model, by_name, state_updates, steps.get(model, "not measured"))
        for model in ("SD1.5", "SDXL")
        if all(site in measured for site in SITES if site.model == model)
    ]
    return {"sites": sites, "models": models, "goals": _goals(sites, models, by_name)}


def _summarize_site(site: Site, timing: dict[str, Any], bandwidth: float, rate: float) -> dict[str, Any]:
    bound = max(band_bytes(site) / bandwidth, band_flops(site) / rate) * 1e6
    return {
        "site": site.name,
        "transport_fraction_of_bound": bound / timing["transport"],
        "transport_speedup_over_dense": timing["dense_matmul"] / timing["transport"],
        "guard_over_attention": timing["guard"] / timing["attention"],
        "overhead_of_attention": _added(timing) / timing["attention"],
    }


def _added(timing: dict[str, Any]) -> float:
    """Microseconds that the operators and the mixing add to a site."""
    return float(timing["transport"] + timing["guard"] + timing["mix"])


def _summarize_model(
    model: str, by_name: dict[str, dict[str, Any]], state_updates: dict[str, float], step: float | str
) -> dict[str, Any]:
    sites = [site for site in SITES if site.model == model]
    # Each grid has one entry in SITES.
    states = sum(state_updates[site.name] for site in sites)
    added = states + sum(site.count * _added(by_name[site.name]) for site in sites)
    attention = sum(site.count * by_name[site.name]["attention"] for site in sites)
    return {
        "model": model,
        "added_microseconds": added,
        "state_microseconds": states,
        "attention_microseconds": attention,
        "overhead_of_attention": added / attention,
        "step_microseconds": step,
        "overhead_of_step": added / step if isinstance(step, int | float) else None,
    }


def _goals(
    sites: list[dict[str, Any]], models: list[dict[str, Any]], by_name: dict[str, dict[str, Any]]
) -> dict[str, bool | None]:
    name = SITES[0].name
    first = next((site for site in sites if site["site"] == name), None)
    guards = [site["guard_over_attention"] <= GUARD_GOAL for site in sites]
    overheads = [model["overhead_of_step"] for model in models]
    whole = len(overheads) == len({site.model for site in SITES}) and None not in overheads
    return {
        "transport at SD1.5 64x64 <= 60 us": (
            by_name[name]["transport"] <= TRANSPORT_GOAL_MICROSECONDS if first else None
        ),
        "transport at SD1.5 64x64 >= 70 % of bound": (
            first["transport_fraction_of_bound"] >= BOUND_GOAL if first else None
        ),
        "guard <= 1.3 attention at every site": all(guards) if len(guards) == len(SITES) else None,
        "step overhead <= 15 %": all(x <= STEP_GOAL for x in overheads) if whole else None,
    }


def as_markdown(results: dict[str, Any]) -> str:
    """The summary as Markdown tables."""
    lines = [
        f"{results['device']}, torch {results['torch']}, CUDA {results['cuda']}; float16, batch 2.",
        "Times in microseconds.",
        "",
        "| site | transport | dense matmul | copy | mix | guard | guard, tight budget | literal guard "
        "| attention | added, % of attention |",
        "|---" * 10 + "|",
    ]
    for timing, site in zip(results["timings"], results["summary"]["sites"], strict=True):
        names = ("transport", "dense_matmul", "copy_same_bytes", "mix", "guard", "guard_tight_budget")
        cells = [f"{timing[name]:.1f}" for name in names]
        cells.append("-" if timing["literal_guard"] is None else f"{timing['literal_guard']:.0f}")
        cells += [f"{timing['attention']:.1f}", f"{100 * site['overhead_of_attention']:.0f}"]
        lines.append(f"| {timing['site']} | " + " | ".join(cells) + " |")
    lines += ["", "| model | added | plain attention | plain step | added, % of step |", "|---" * 5 + "|"]
    for model in results["summary"]["models"]:
        step, overhead = model["step_microseconds"], model["overhead_of_step"]
        cells = [f"{model[name]:.0f}" for name in ("added_microseconds", "attention_microseconds")]
        cells += [f"{step:.0f}", f"{100 * overhead:.1f}"] if overhead is not None else [str(step), "-"]
        lines.append(f"| {model['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

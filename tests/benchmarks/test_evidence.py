"""The table that the ablations write into the documentation."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import END, SHOWN, START, VARIANTS, cell, tables, write_page
from sws_export.evaluation.statistics import Figure


def report() -> dict[str, Any]:
    figure = {"value": 0.0123, "low": -0.01, "high": 0.02, "pairs": 9}
    names = ["plain", *(variant.name for variant in VARIANTS)]
    variants = {name: dict.fromkeys(SHOWN, figure) for name in names}
    example = {"pairs": 9, "frames": 2, "steps": 3, "guidance": 3.0, "variants": variants}
    return {"examples": {"shapes": example}}


def test_only_the_section_of_the_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    page.write_text(f"before\n{START}old\n{END}after\n")
    write_page(report(), page)
    text = page.read_text()
    assert text.startswith(f"before\n{START}")
    assert text.endswith(f"{END}after\n")
    assert "old" not in text
    write_page(report(), page)
    assert page.read_text() == text


def test_every_variant_is_a_row() -> None:
    rows = [line for line in tables(report()).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[1:]] == [
        "plain",
        *(variant.name for variant in VARIANTS),
    ]
    assert {row.count("|") for row in rows} == {len(SHOWN) + 2}


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(-0.031, -0.04, -0.02, 9), "**-3.10% (-4.00 to -2.00)**"),
        (Figure(0.001, -0.04, 0.02, 9), "+0.10% (-4.00 to +2.00)"),
    ],
)
def test_changes_are_bold_where_the_interval_has_no_zero(figure: Figure, text: str) -> None:
    assert cell("SWS 1", "flicker", figure) == text

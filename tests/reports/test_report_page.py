"""The report in a real browser, on a phone and on a desk, light and dark: nothing sticks out, nothing is faint, nothing complains."""

from __future__ import annotations

from pathlib import Path

import chromium
import pytest
import reported
from edgeml_report import document, plots, to_html

pytestmark = pytest.mark.skipif(chromium.BROWSER is None, reason=f"needs one of {', '.join(chromium.NAMES)}")
LONG = "a name without any place to break " * 3 + "x" * 400


@pytest.fixture(scope="module", params=["drawn", "undrawn", "hostile"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with plots, without, and with names that are too long."""
    if request.param != "undrawn" and not plots.available():
        pytest.skip("needs matplotlib, the extra 'report'")
    records = reported.everything()
    if request.param == "hostile":
        for record in records:
            record |= {"bundle": LONG, "task": LONG + record["memory"]}
        for variant in records[5]["eval"]["variants"]:
            variant |= {
                "name": LONG + variant["name"],
                "domains": {LONG: variant["domains"]["law"], "\u05e9\u05dc\u05d5\u05dd": variant["domains"]["law"]},
            }
    place = tmp_path_factory.mktemp("page") / "report.html"
    place.write_text(to_html(document(records), plotted=request.param != "undrawn"), "utf-8")
    return place


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_and_can_be_read(page: Path, dark: bool) -> None:
    sizes = [chromium.PHONE, chromium.DESKTOP]
    for size, found in zip(sizes, chromium.measure(page, sizes, dark), strict=True):
        assert found["overflow"] <= size[0]
        assert found["sticking"] == []
        assert found["faint"] == []
        assert found["clipped"] == []
        assert found["ground"] == ("rgb(16, 19, 23)" if dark else "rgb(245, 246, 247)")


def test_the_console_is_silent(page: Path, tmp_path: Path) -> None:
    for size in (chromium.PHONE, chromium.DESKTOP):
        picture = tmp_path / "report.png"
        assert chromium.screenshot(page, picture, size) == []
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000


def test_a_bad_page_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><html><head><title>x</title><script>console.error("no")</script></head><body style="background: #ffffff">'
        '<p style="width: 2000px">wide</p><p style="color: #cccccc">faint</p></body></html>'
    )
    (found,) = chromium.measure(page, [chromium.PHONE])
    assert found["overflow"] > 2000
    assert found["sticking"]
    assert len(found["faint"]) == 1
    assert len(chromium.screenshot(page, tmp_path / "bad.png", chromium.PHONE)) == 1

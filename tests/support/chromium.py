"""Headless Chromium without a driver: a page is measured by a script that a copy of it carries, which writes what it finds into the DOM."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
PHONE, DESKTOP = (390, 844), (1280, 900)

#: Chromium's windows are at least 500 pixels wide, its frames are not. Each frame tells this page what it found.
FRAMES = """<!doctype html><body>{frames}<pre id="measured"></pre><script>const found = [];
onmessage = event => {{ found.push(event.data); document.getElementById("measured").textContent = JSON.stringify(found) }}</script>"""

#: What a careful person would check: nothing wider than the screen, text that can be read on its ground, no letters cut off.
SCRIPT = r"""
addEventListener("load", () => {
  const wide = innerWidth, found = {width: wide, overflow: document.documentElement.scrollWidth, sticking: [], faint: [], clipped: []};
  found.ground = getComputedStyle(document.body).backgroundColor;
  const shown = element => element.checkVisibility({visibilityProperty: true}) && element.getClientRects().length;
  const inside = element => element.closest(".scroll, pre, .unseen, .skip");
  const rgb = text => text.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = rgb(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  for (const element of document.body.querySelectorAll("*")) {
    if (!shown(element)) continue;
    const box = element.getBoundingClientRect(), name = element.tagName + ": " + element.textContent.trim().slice(0, 60);
    if (!inside(element) && box.right > wide + 0.5) found.sticking.push(name);
    const svg = element.ownerSVGElement;
    if (element.tagName === "text") {
      const room = svg.getBoundingClientRect();
      const across = box.left < room.left - 2 || box.right > room.right + 2, down = box.top < room.top - 2 || box.bottom > room.bottom + 2;
      if (across || down) found.clipped.push(name);
    }
    const speaks = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (speaks && !element.closest(".skip") && element.tagName !== "title" && element.tagName !== "desc") {
      const style = getComputedStyle(element), colour = svg ? style.fill : style.color;
      const ratio = contrast(rgb(colour), ground(svg ? svg.parentElement : element));
      if (ratio < 4.5) found.faint.push(name + " " + ratio.toFixed(2));
    }
  }
  parent.postMessage(found, "*");
});
"""


def _run(page: Path, *options: str) -> tuple[str, str]:
    assert BROWSER is not None
    fixed = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}",
    )
    done = subprocess.run([BROWSER, *fixed, *options, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def _look(size: tuple[int, int], dark: bool) -> list[str]:
    return [f"--window-size={size[0]},{size[1]}", *(["--force-dark-mode"] if dark else [])]


def measure(page: Path, sizes: Sequence[tuple[int, int]], dark: bool = False) -> list[dict[str, Any]]:
    """What `SCRIPT` finds on the page at each size."""
    copy, frames = page.with_name(f"measured-{page.name}"), page.with_name(f"frames-{page.name}")
    without_policy = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text("utf-8"))
    copy.write_text(without_policy.replace("</head>", f"<script>{SCRIPT}</script></head>"), "utf-8")
    shown = [f'<iframe src="{copy.name}" width="{width}" height="{height}" style="border:0"></iframe>' for width, height in sizes]
    frames.write_text(FRAMES.format(frames="".join(shown)), "utf-8")
    dom, _ = _run(frames, *_look((2000, 2000), dark), "--dump-dom")
    match = re.search(r'<pre id="measured">(.+?)</pre>', dom, re.S)
    assert match, dom[-500:]
    found: list[dict[str, Any]] = json.loads(unescape(match[1]))
    assert len(found) == len(sizes)
    return sorted(found, key=lambda one: [width for width, _ in sizes].index(one["width"]))


def screenshot(page: Path, picture: Path, size: tuple[int, int], dark: bool = False) -> list[str]:
    """Take a picture of the page as it is; returns what the console said."""
    _, log = _run(page, *_look(size, dark), f"--screenshot={picture}")
    return [line for line in log.splitlines() if "CONSOLE" in line]

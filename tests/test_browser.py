"""The report as a browser shows it, on a desk and on a phone: nothing fetched, nothing refused, nothing too wide."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import METHODS, fake, hub_origin, with_blocks, with_tensors

from nashswarm import rendering, report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DESK, PHONE = 1280, 390  # CSS pixels
SMALLEST = 11  # CSS pixels of any letters that are not part of a figure

# What the page has become, handed to the frame around it for --dump-dom. What lies in a container that scrolls may be
# wide.
PROBE = """<script>addEventListener("load", () => {
  const outside = [...document.querySelectorAll("body *")].filter((e) => !e.parentElement.closest(".wide"));
  const name = (e) => e.tagName + ": " + e.textContent.slice(0, 60);
  const found = {
    width: innerWidth,
    content: document.documentElement.scrollWidth,
    wide: outside.filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5).map(name),
    small: outside.filter((e) => parseFloat(getComputedStyle(e).fontSize) < SMALLEST).map(name),
    blank: [...document.images].filter((i) => !i.naturalWidth).map((i) => i.alt),
    images: document.images.length,
    fetched: performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:")),
  };
  parent.document.getElementById("found").textContent = JSON.stringify(found);
})</script>""".replace("SMALLEST", str(SMALLEST))

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    corpora = ["sampled", "a_text_with_a_long_name"]
    models = ["reference", "another-model-of-ours"]
    metrics = with_tensors(with_blocks(fake(models, corpora=corpora)))
    target = tmp_path_factory.mktemp("report")
    report.write(target, report.Run(metrics, models, list(METHODS), corpora, origin=hub_origin()), 40)
    return (target / "report.html").read_text(encoding="utf-8")


def look(page: str, width: int, directory: Path) -> tuple[dict[str, Any], str]:
    """What PROBE finds in a viewport of that width, and what the browser says on its console.

    The viewport is a frame: no window of Chromium's is narrower than 500 pixels.
    """
    assert rendering.POLICY in page
    probed = page.replace(rendering.POLICY, f"{rendering.POLICY}; script-src 'unsafe-inline'")
    probed = html.escape(probed.replace("</body>", f"{PROBE}</body>"))
    frame = f'<iframe srcdoc="{probed}" style="width:{width}px;height:900px;border:0"></iframe>'
    file = directory / "framed.html"
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>{frame}', encoding="utf-8")
    # Without the sandbox, which root cannot have; with a profile of its own, so that no running browser answers.
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"]
    flags += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]  # its own requests
    command = [str(BROWSER), *flags, f"--user-data-dir={directory / 'profile'}", "--dump-dom", file.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    dumped = re.search(r'<pre id="found">(.+?)</pre>', ran.stdout, re.DOTALL)
    assert dumped, ran.stderr[-2000:]
    return json.loads(html.unescape(dumped[1])), "\n".join(x for x in ran.stderr.split("\n") if ":CONSOLE" in x)


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_page_fits_and_is_whole(page: str, width: int, tmp_path: Path) -> None:
    found, console = look(page, width, tmp_path)
    assert found["width"] == width
    assert found["content"] <= width
    assert found["wide"] == found["small"] == found["blank"] == found["fetched"] == []
    assert found["images"] == page.count("<img ") > 5
    assert console == ""


FAULTS = (
    '<p style="white-space:nowrap">' + "wide " * 99 + "</p>"
    '<p style="width:50em">too wide</p><p style="font-size:9px">too small</p>'
    '<img alt="broken" src="data:image/png;base64,AAAA"><img alt="remote" src="http://localhost:9/a.png">'
)


def test_planted_faults_are_seen(tmp_path: Path) -> None:
    page = rendering.web_page("A page", [rendering.Text("Opening."), rendering.Text("Body.")])
    found, console = look(page.replace("</main>", f"{FAULTS}</main>"), PHONE, tmp_path)
    assert found["content"] > PHONE
    assert "P: too wide" in found["wide"]
    assert found["small"] == ["P: too small"]
    assert found["blank"] == ["broken", "remote"]
    assert "http://localhost:9/a.png" in console

"""Whether a person sees the loss of a resumed operation in the dashboard: `see_curve.py LINK ID OUT.png`.

Follows the link of `ops dashboard`, finds the operation in the list, and looks at what is drawn. Raises AssertionError.
"""

import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
# A line through some thousand steps is this much ink, at least; axes and a grid alone are of one more colour.
INK = 300
PATIENCE_MS = 60_000


def main(link: str, operation_id: str, out: Path) -> None:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        hosts = set[str]()
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(link)
        look(page, operation_id, out)
        browser.close()
    assert hosts == {link.split("/")[2]}, f"it spoke to {hosts}"


def look(page: Page, operation_id: str, out: Path) -> None:
    page.locator(f"a[href*='operations/{operation_id}']").first.click()
    chart = page.locator("figure.chart").filter(has=page.get_by_role("heading", name="loss", exact=True))
    expect(chart.locator("path.js-line").first).to_be_visible()
    expect(chart).to_contain_text("attempt 2")
    expect(page.locator("#main")).to_contain_text("completed")
    page.screenshot(path=out)
    drawn = Image.open(BytesIO(chart.screenshot())).convert("RGB")
    line = chart.locator("path.js-line").first.evaluate("line => getComputedStyle(line).stroke")
    colour = tuple(map(int, line.removeprefix("rgb(").rstrip(")").split(",")))
    pixels = {of: number for number, of in drawn.getcolors(drawn.width * drawn.height)}
    ink = pixels.get(colour, 0)
    assert ink >= INK, f"{ink} pixels of the line's colour {colour}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

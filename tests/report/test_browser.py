"""The page in a browser: on a phone and on a desk, in light and dark mode, and on paper.

The tests need Chromium (Debian's package, or Chrome), driven by playwright; without it they are skipped.
"""

import shutil

import pytest

from scoresde.cli.sweeps import reported_run, write_page
from scoresde.report import write_report
from tests.report.runs import new_run, source_of, whole_run

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
KINDS = {"images": (1, 8, 8), "plane": (2,), "series": (2, 16), "table": (4,)}

# The contrast of every text and every coloured mark of a chart with its background (WCAG 2.2), and what it is.
CONTRASTS = """() => {
  const parse = colour => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const known = {}, parsed = colour => known[colour] ??= parse(colour);
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const luminance = colour => colour.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const background = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parsed(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const contrast = (colour, element) => {
    const ground = background(element), pair = [luminance(ground), luminance(over(colour, ground))];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || ["STYLE", "title", "desc"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), colour = element instanceof SVGElement ? style.fill : style.color;
    texts.push([contrast(parsed(colour), element), text.slice(0, 40)]);
  }
  const marks = [...document.querySelectorAll("svg [style*='var(--c']")].map(mark => {
    const style = getComputedStyle(mark), isLine = style.fill === "none" || !/fill: var\\(--c/.test(mark.outerHTML);
    const [r, g, b, a] = parsed(isLine ? style.stroke : style.fill);
    const opacity = style.opacity * (isLine ? style.strokeOpacity : style.fillOpacity);
    return [contrast([r, g, b, a * opacity], mark), mark.getAttribute("style")];
  });
  return {texts, marks, ground: parsed(getComputedStyle(document.body).backgroundColor)};
}"""
LAYOUT = """() => ({
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  cut: [...document.querySelectorAll("svg text, h1, h2, h3, p, dt, dd, figcaption, .time, .legend span")]
    .filter(e => !e.closest("details:not([open])"))
    .filter(e => { const r = e.getBoundingClientRect(); return r.width && (r.left < 0 || r.right > innerWidth); })
    .map(e => e.textContent.trim().slice(0, 40)),
  images: [...document.images].every(i => i.complete && i.naturalWidth > 0),
  charts: Math.min(...[...document.querySelectorAll("svg.chart text")].map(e => e.getBoundingClientRect().height)),
  labels: Math.min(...[...document.querySelectorAll(".film .time, .row-labels span")].map(
    e => parseFloat(getComputedStyle(e).fontSize))),
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The open report on a whole run of each kind of states, on a run with only a checkpoint, and on several runs.

    (page, messages) by name.
    """
    if CHROMIUM is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed: apt-get install --no-install-recommends chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    directory = tmp_path_factory.mktemp("reports")
    runs = {name: whole_run(directory / name, shape) for name, shape in KINDS.items()}
    runs["bare"] = new_run(directory / "bare", (1, 8, 8))
    files = {name: write_report(source_of(run)) for name, run in runs.items()}
    several = {name: reported_run({"run": runs[name], "paths": {"report": path}}) for name, path in files.items()}
    files["several"], pages = write_page(several, []), {}
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, path in files.items():
            page, messages = browser.new_page(), []
            page.on("console", lambda message, messages=messages: messages.append(message.text))
            page.on("pageerror", lambda error, messages=messages: messages.append(str(error)))
            page.on("request", lambda request, messages=messages: messages.append(request.url))
            page.goto(path.as_uri(), wait_until="load")
            pages[name] = page, messages
        yield pages
        browser.close()


@pytest.mark.parametrize("name", [*KINDS, "bare", "several"])
def test_a_page_is_readable_on_a_phone_and_on_a_desk(pages, name):
    page, messages = pages[name]
    for width in (1400, 400, 360):
        page.set_viewport_size({"width": width, "height": 900})
        layout = page.evaluate(LAYOUT)
        assert layout["overflow"] <= 0
        assert layout["cut"] == []
        assert layout["images"]
        assert layout["charts"] >= (10 if width >= 400 else 9)
        assert layout["labels"] is None or layout["labels"] >= 12  # of films
    assert [message for message in messages if not message.startswith("data:")] == [page.url]


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
@pytest.mark.parametrize("name", ["images", "plane", "bare", "several"])
def test_texts_and_marks_stand_out_from_their_background(pages, name, scheme):
    """Texts by 4.5:1, the marks of charts by 3:1 (WCAG 2.2, 1.4.3 and 1.4.11)."""
    page, _ = pages[name]
    if scheme == "print":
        page.emulate_media(media="print", color_scheme="dark")
    else:
        page.emulate_media(media="screen", color_scheme=scheme)
    found = page.evaluate(CONTRASTS)
    assert len(found["texts"]) > 60
    assert len(found["marks"]) >= (8 if name == "bare" else 20)
    assert [text for contrast, text in found["texts"] if contrast < 4.5] == []
    assert [mark for contrast, mark in found["marks"] if contrast < 3] == []
    assert (sum(found["ground"][:3]) < 200) == (scheme == "dark")


def test_a_focused_link_is_outlined(pages):
    page, _ = pages["images"]
    page.emulate_media(media="screen")
    page.keyboard.press("Tab")
    focused = "() => [document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
    assert page.evaluate(focused) == ["A", "solid"]


def test_paper_shows_what_is_folded_on_the_screen(pages):
    page, _ = pages["images"]
    pre = "() => document.querySelector('#configuration').parentElement.querySelector('pre')"
    page.emulate_media(media="screen")
    assert not page.evaluate(f"{pre}.checkVisibility()")
    page.emulate_media(media="print")
    assert page.evaluate(f"{pre}.checkVisibility()")
    assert page.evaluate(f"{pre}.offsetHeight") > 300
    assert page.pdf().startswith(b"%PDF")

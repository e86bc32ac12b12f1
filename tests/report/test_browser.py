"""The page in a browser: on a phone and on a desk, light and dark, and on paper.

It takes Chromium (Debian's package, or Chrome), which playwright drives; without it these tests are skipped.
"""

import shutil
from itertools import pairwise

import pytest

from scoresde.report import write_report
from tests.report.runs import new_run, source_of, whole_run

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
KINDS = {"images": (1, 8, 8), "plane": (2,), "vectors": (5,), "series": (2, 16)}

# The contrast of every text with what is behind it (WCAG 2.2), and where it is.
COLOURS = """
  const parse = colour => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const luminance = colour => colour.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const contrast = (colour, ground) => {
    const [dark, light] = [luminance(ground), luminance(over(colour, ground))].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
"""
CONTRAST = f"""() => {{
{COLOURS}
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {{
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || ["STYLE", "SCRIPT", "title", "desc"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), inSvg = element instanceof SVGElement;
    found.push([contrast(parse(inSvg ? style.fill : style.color), behind(element)), text.slice(0, 40)]);
  }}
  return found;
}}"""
MARKS = f"""() => {{
{COLOURS}
  return [...document.querySelectorAll("svg :is(.line, .dots, .bar, .whisker, .mark, .box, .rule)")].map(mark => {{
    const style = getComputedStyle(mark), painted = style.fill === "none" ? style.stroke : style.fill;
    const [r, g, b, a] = parse(painted);
    return [contrast([r, g, b, a * style.opacity], behind(mark)), mark.getAttribute("class")];
  }});
}}"""
SMALLEST = """() => Math.min(...[...document.querySelectorAll("svg.chart text")].map(
  e => e.getBoundingClientRect().height))"""

LABELS = """() => Math.min(...[...document.querySelectorAll(".film .time, .row-labels span")].map(
  e => parseFloat(getComputedStyle(e).fontSize)))"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip(f"none of {', '.join(NAMES)} found: apt-get install --no-install-recommends chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright not found: pip install playwright")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A report on a whole run of each kind of states, and on a run with nothing but a checkpoint."""
    directory = tmp_path_factory.mktemp("reports")
    runs = {name: whole_run(directory / name, shape) for name, shape in KINDS.items()}
    runs["bare"] = new_run(directory / "bare", (1, 8, 8))
    return {name: write_report(source_of(run)) for name, run in runs.items()}


@pytest.fixture
def opened(browser, reports):
    """A function: a report opened in a window; the browser has complained about nothing and asked for nothing."""
    contexts, said, asked = [], [], []

    def open_page(name, width=1400, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(reports[name].as_uri(), wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", [*KINDS, "bare"])
def test_a_page_fits_into_its_window(opened, name, width):
    page = opened(name, width)
    sizes = page.evaluate("() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert sizes[0] <= sizes[1]
    assert page.evaluate("() => [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate(SMALLEST) >= 10 or name == "bare"
    assert page.evaluate(LABELS) >= 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["images", "plane", "bare"])
def test_text_stands_out_from_its_ground(opened, name, scheme):
    page = opened(name, 400, scheme)
    found = page.evaluate(CONTRAST)
    assert len(found) > 60
    assert [text for contrast, text in found if contrast < 4.5] == []
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["images", "plane"])
def test_marks_of_charts_stand_out_from_their_ground(opened, name, scheme):
    """By 3:1, as what one has to see to understand a picture (WCAG 2.2, 1.4.11)."""
    found = opened(name, 400, scheme).evaluate(MARKS)
    assert len(found) > 20
    assert [mark for contrast, mark in found if contrast < 3] == []


def test_headings_and_alternatives(opened):
    page = opened("images")
    levels = page.evaluate("() => [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.evaluate("() => [...document.images].every(i => i.alt.length > 40)")
    unnamed = "() => [...document.querySelectorAll('svg[role=img] > title')].filter(t => !t.textContent).length"
    assert page.evaluate(unnamed) == 0


def test_links_are_seen_when_they_have_the_focus(opened):
    page = opened("images")
    page.keyboard.press("Tab")
    focused = "() => [document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
    assert page.evaluate(focused) == ["A", "solid"]


def test_paper_shows_what_is_folded_on_the_screen(opened):
    page = opened("images", scheme="dark")
    height = "() => document.querySelector('#configuration').parentElement.querySelector('pre').offsetHeight"
    visible = "() => document.querySelector('#configuration').parentElement.querySelector('pre').checkVisibility()"
    assert not page.evaluate(visible)
    page.emulate_media(media="print")
    assert page.evaluate(visible)
    assert page.evaluate(height) > 300
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [text for contrast, text in page.evaluate(CONTRAST) if contrast < 4.5] == []
    assert page.pdf().startswith(b"%PDF")

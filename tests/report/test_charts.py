"""Charts: where things are drawn, what is said about them, and that nothing gets out of its place."""

import re
from xml.etree import ElementTree

import pytest

from scoresde.report.charts import Bar, Bars, Chart, panel
from scoresde.report.layers import Band, Dots, Histogram, Line, Rule

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg):
    """The tree of an SVG, which a page need not name the namespace of."""
    return ElementTree.fromstring(str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def words(svg):
    return [element.text for element in parsed(svg).iter(f"{SVG}text")]


def path_of(svg, kind):
    (found,) = (e for e in parsed(svg).iter(f"{SVG}path") if kind in e.get("class").split())
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", found.get("d"))]


def test_a_line_goes_through_its_points():
    chart = Chart("T", "D", [Line("a", [0, 5, 10], [0, 10, 0])], x_span=(0, 10), y_span=(0, 10), x="x", y="y")
    (x0, y0), (x1, y1), (x2, y2) = path_of(chart.svg(), "line")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0, y1) == (y2, 22.0)
    assert y0 == chart.height - 34


def test_a_chart_is_named_and_described():
    tree = parsed(Chart("Loss", "It falls from 3 to 1.", [Line("", [1, 2], [3, 1])]).svg())
    assert tree.get("role") == "img"
    title, description = tree.find(f"{SVG}title"), tree.find(f"{SVG}desc")
    assert (title.text, description.text) == ("Loss", "It falls from 3 to 1.")
    assert tree.get("aria-labelledby").split() == [title.get("id"), description.get("id")]


def test_text_is_escaped():
    evil = '<script>alert("x")</script>&'
    chart = Chart(evil, evil, [Line(evil, [1, 2], [1, 2]), Line("b", [1, 2], [2, 1])], x=evil, y=evil)
    svg = str(chart.svg()) + "".join(str(glyph) for glyph, _ in chart.legend)
    assert "<script>" not in svg
    assert evil in words(chart.svg())
    bars = str(Bars(evil, evil, [Bar(evil, 1.0, words=evil)], x=evil).svg())
    assert "<script>" not in bars


def test_what_is_not_finite_or_not_positive_is_left_out():
    gaps = Chart("T", "D", [Line("", [0, 1, 2, 3], [1, float("nan"), 2, float("inf")])]).svg()
    assert len(path_of(gaps, "line")) == 2
    log = Chart("T", "D", [Line("", [1, 2, 3], [-1, 1, 10])], y_log=True).svg()
    assert len(path_of(log, "line")) == 2
    assert "nan" not in f"{gaps}{log}".lower()


def test_everything_is_drawn_inside():
    layers = [
        Band("floor", 0.1, 0.2),
        Line("a", [5, 10, 20], [1, 0.5, 0.3], [0.9, 0.4, 0.01], [1.1, 0.6, 0.4], style="both"),
        Line("b", [5, 10, 20], [4000, 0.5, 0.3], colour=5, style="points"),
    ]
    svg = Chart("T", "D", layers, x_log=True, y_log=True, y_span=(0.05, 10), x="x", y="y").svg()
    for element in parsed(svg).iter():
        for name, most in (("x", 360), ("cx", 360), ("y", 236), ("cy", 236)):
            if element.get(name) is not None:
                assert -1 <= float(element.get(name)) <= most + 1


def test_one_unit_is_as_long_on_either_axis_of_a_square_chart():
    svg = Chart("T", "D", [Line("", [0, 1, 1], [0, 0, 1])], square=True, height=340.0).svg()
    (x0, y0), (x1, _), (_, y2) = path_of(svg, "line")
    assert x1 - x0 == pytest.approx(y0 - y2, abs=0.2)


def test_a_histogram_stands_on_zero():
    svg = Chart("T", "D", [Histogram("h", [0, 1, 2], [4, 2]), Rule("mean", 1.0)], y="n").svg()
    boxes = list(parsed(svg).iter(f"{SVG}rect"))
    bottoms = {float(box.get("y")) + float(box.get("height")) for box in boxes}
    assert len(bottoms) == 1
    heights = [float(box.get("height")) for box in boxes]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)


def test_a_legend_where_there_is_more_than_one_name():
    assert Chart("T", "D", [Line("a", [1], [1])]).legend == []
    chart = Chart("T", "D", [Line("a", [1], [1]), Dots("b", [1], [1]), Line("", [1], [1])])
    assert [name for _, name in chart.legend] == ["a", "b"]
    for glyph, _ in chart.legend:
        assert parsed(glyph).get("aria-hidden") == "true"


def test_bars_are_as_long_as_their_values():
    svg = Bars("T", "D", [Bar("one", 1.0), Bar("two", 2.0, 1.5, 2.5, "two!")], x="units").svg()
    first, second = (float(e.get("width")) for e in parsed(svg).iter(f"{SVG}rect"))
    assert second == pytest.approx(2 * first, abs=0.2)
    assert {"one", "two", "two!", "units"} <= set(words(svg))


def test_marks_of_estimates_are_between_their_ends():
    svg = Bars("T", "D", [Bar("a", 1.0, 0.8, 1.2), Bar("b", 1.4, 1.3, 1.5)], x="x", lengths=False).svg()
    start, end = re.search(r'class="bar c0" d="M([\d.]+) [\d.]+H([\d.]+)"', str(svg)).groups()
    centre = float(re.search(r'cx="([\d.]+)"', str(svg))[1])
    assert centre == pytest.approx((float(start) + float(end)) / 2, abs=0.2)


def test_a_panel_has_no_numbers():
    svg = panel("T", "D", [Dots("", [0.0, 1.0], [0.0, 1.0])], (0, 1), (0, 1))
    assert words(svg) == []
    assert path_of(svg, "dots") == [(3.0, 117.0), (117.0, 3.0)]

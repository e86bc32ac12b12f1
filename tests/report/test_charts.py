"""Charts: what is drawn where, in which colours, and that text from a run cannot leave its place."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from scoresde.plots import COLOURS, curve
from scoresde.report.charts import Bar, bar_chart, dots, histogram, new_axes, scale_y, to_chart
from tests.conftest import normal

SVG = "{http://www.w3.org/2000/svg}"
EVIL = '<script>alert("x")</script>&$\\frac$'


def parsed(svg):
    """The tree of an SVG; pages need not declare its namespaces."""
    namespaces = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    return ElementTree.fromstring(str(svg).replace("<svg ", namespaces, 1))


def texts(svg):
    return [element.text for element in parsed(svg).iter(f"{SVG}text")]


def coloured(svg, number):
    """Corners (n, 2) of each path in the colour of that number."""
    paths = [e.get("d") for e in parsed(svg).iter(f"{SVG}path") if f"var(--c{number})" in e.get("style")]
    return [np.array(re.findall(r"[ML] ?(-?[\d.]+) (-?[\d.]+)", path), float) for path in paths]


def line_chart(x, y, axes=None, **style):
    axes = axes or new_axes("x", "y")
    axes.plot(x, y, color=COLOURS[0], **style)
    return to_chart(axes, "T", "D")


def test_a_line_passes_through_its_points():
    ((start, middle, end),) = coloured(line_chart([0, 5, 10], [0, 10, 0]).svg, 0)
    assert middle[0] - start[0] == pytest.approx(end[0] - middle[0], abs=0.02)
    assert start[1] == end[1] > middle[1]


def test_a_chart_is_named_and_described():
    axes = new_axes()
    tree = parsed(to_chart(axes, "Loss", "It falls from 3 to 1.").svg)
    assert tree.get("role") == "img"
    title, description = tree.find(f"{SVG}title"), tree.find(f"{SVG}desc")
    assert (title.text, description.text) == ("Loss", "It falls from 3 to 1.")
    assert tree.get("aria-labelledby").split() == [title.get("id"), description.get("id")]


def test_text_is_escaped_and_not_read_as_mathematics():
    axes = new_axes(EVIL, EVIL)
    for name in (EVIL, "b"):
        curve(axes, np.arange(2), np.arange(2), label=name)
    chart = to_chart(axes, EVIL, EVIL)
    bars = bar_chart(EVIL, [Bar(EVIL.replace("$", ""), 1.0, None, "1", 0)], EVIL, lengths=True)
    assert texts(chart.svg).count(EVIL) == 2
    for svg in (chart.svg, bars.svg, *chart.legend.values()):
        assert not {element.tag.removeprefix(SVG) for element in parsed(svg).iter()} & {"script", "style", "a"}
        assert "on" not in {name for element in parsed(svg).iter() for name in element.attrib}


def test_colours_and_font_are_those_of_the_page():
    axes = new_axes("x", "y")
    for number in range(7):
        curve(axes, np.arange(2), np.arange(2) + number, colour=number)
    axes.axhspan(1, 2, color="#808080")
    svg = str(to_chart(axes, "T", "D").svg)
    others = {"muted", "grid", "paper", "band"}
    assert set(re.findall(r"var\(--(\w+)\)", svg)) == {*(f"c{i}" for i in range(7)), *others}
    assert not re.search(r"#[0-9a-f]{6}(?![0-9a-f])|font", svg)


def test_the_same_chart_has_the_same_bytes_and_others_have_other_identifiers():
    svgs = [str(line_chart([1, 2], [1, 2], marker="o", axes=new_axes(x)).svg) for x in ("x", "x", "z")]
    assert svgs[0] == svgs[1] != svgs[2]
    first, second = (to_chart(new_axes("x"), title, "D").svg for title in "ab")
    identifiers = [{e.get("id") for e in parsed(svg).iter() if e.get("id")} for svg in (first, second)]
    assert identifiers[0].isdisjoint(identifiers[1])


def test_values_without_a_place_on_the_axes_are_left_out():
    gap = line_chart([0, 1, 2, 3, 4], [1, 2, float("nan"), float("inf"), 2])
    assert np.isfinite(np.concatenate(coloured(gap.svg, 0))).all()
    axes = new_axes()
    scale_y(axes, np.array([1.0, 100.0, np.nan]))
    assert axes.get_yscale() == "log"
    (drawn,) = coloured(line_chart([1, 2, 3], [-1, 1, 100], axes).svg, 0)
    assert len(drawn) == 2


def test_a_single_point_has_a_mark():
    assert "<use " in line_chart([1], [1]).svg.partition("var(--c0)")[2]


@pytest.mark.parametrize(
    ("values", "scale"), [([1, 10], "linear"), ([-1, 30], "linear"), ([], "linear"), ([1, 30], "log")]
)
def test_positive_values_far_apart_get_a_logarithmic_axis(values, scale):
    axes = new_axes()
    scale_y(axes, np.array(values, float))
    assert axes.get_yscale() == scale


def test_dots_are_drawn_each_in_its_place():
    axes = new_axes()
    dots(axes, torch.cat([torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 0.0]]), normal(997, 2)]), colour=2)
    axes.set_aspect("equal", "datalim")
    svg = to_chart(axes, "T", "D").svg
    path = next(points for points in coloured(svg, 2) if len(points) > 100)
    a, b, c = path[:3]
    assert len(path) == svg.count("h0") == 1000
    assert c[0] - a[0] == pytest.approx(3 * (b[0] - a[0]), abs=0.03)
    assert b[0] - a[0] == pytest.approx(a[1] - b[1], abs=0.02)  # one unit is as long on either axis


def test_a_histogram_stands_on_zero():
    axes = new_axes()
    histogram(axes, np.array([0.0, 0.1, 0.2, 0.3, 1.0, 0.9]), bins=2)
    high, low = coloured(to_chart(axes, "T", "D").svg, 0)
    assert high[:, 1].max() == low[:, 1].max()
    assert np.ptp(high[:, 1]) == pytest.approx(2 * np.ptp(low[:, 1]), abs=0.03)


def test_a_legend_has_two_names_or_more():
    axes = new_axes()
    curve(axes, np.arange(2), np.arange(2), label="a")
    assert to_chart(axes, "T", "D").legend == {}
    dots(axes, torch.zeros(1, 2), colour=1, label="b")
    curve(axes, np.arange(2), np.arange(2))
    chart = to_chart(axes, "T", "D")
    assert set(chart.legend) == {"a", "b"}
    for name, colour in (("a", "var(--c0)"), ("b", "var(--c1)")):
        assert colour in chart.legend[name]
        assert parsed(chart.legend[name]).get("aria-hidden") == "true"


def test_bars_are_as_long_as_their_values():
    bars = [Bar("one", 1.0, None, "1", 0), Bar("two", 2.0, 0.5, "two!", 1)]
    svg = bar_chart("T", bars, "units", lengths=True).svg
    (one,), (two,) = coloured(svg, 0), coloured(svg, 1)
    assert np.ptp(two[:, 0]) == pytest.approx(2 * np.ptp(one[:, 0]), abs=0.03)
    assert {"one", "two", "two!", "units"} <= set(texts(svg))


def test_marks_of_estimates_are_in_the_middle_of_their_errors():
    svg = bar_chart("T", [Bar("a", 1.0, 0.2, "1", 0), Bar("b", 1.4, 0.1, "2", 1)], "x", lengths=False).svg
    error = next(path for path in coloured(svg, 0) if len(path) == 2 and np.ptp(path[:, 0]) > 10)
    (mark,) = (e for e in parsed(svg).iter(f"{SVG}use") if "var(--c0)" in (e.get("style") or ""))
    assert float(mark.get("x")) == pytest.approx(error[:, 0].mean(), abs=0.02)

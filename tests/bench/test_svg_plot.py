"""Charts as SVG."""

import math
import xml.etree.ElementTree as xml

import pytest
from hypothesis import given
from hypothesis import strategies as st
from svg_plot import Panel, Series, height_of, svg, ticks

points = st.lists(st.tuples(st.floats(-1e6, 1e6), st.one_of(st.floats(-1e6, 1e6), st.just(math.nan))), max_size=20)


@given(
    panels=st.lists(
        st.builds(
            Panel,
            title=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=5),
            series=st.lists(
                st.builds(Series, name=st.just("<&>"), points=points, style=st.sampled_from(["line", "step", "dots"])),
                max_size=3,
            ),
            marks=st.just([0.0]),
        ),
        max_size=3,
    )
)
def test_any_figures_make_a_picture(panels: list[Panel]) -> None:
    root = xml.fromstring(svg("a title", panels))
    assert root.attrib["height"] == str(height_of(len(panels)))


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-6 * span - 1e-6 <= tick <= low + span + 1e-6 * span + 1e-6 for tick in found)


def test_far_values_sit_at_the_edge() -> None:
    text = svg("t", [Panel(title="p", series=[Series(name="s", points=[(0, 5), (1, 500)], style="dots")], most=10)])
    circles = [node for node in xml.fromstring(text).iter() if node.tag.endswith("circle")]
    assert [float(node.attrib["cy"]) for node in circles] == pytest.approx([44 + 55, 44])

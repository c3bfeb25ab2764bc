"""state.js by itself, in a page of the server: no node.js is needed."""

from __future__ import annotations

from typing import Any

import pytest
from drag_editor import text

pytestmark = pytest.mark.parametrize("opened", [("newest", "canvas")], ids="-".join, indirect=True, scope="session")
ARROW = {"from": [0.2, 0.3], "to": [0.6, 0.7]}


@pytest.fixture(scope="session")
def state(opened: Any) -> Any:
    """state(expression, *values): an expression of state.js's names and of ``given``."""

    def run(expression: str, *given: Any) -> Any:
        return opened.page.evaluate(
            """async ([expression, given]) => {
                const path = Object.values(await (await fetch("/extensions")).json()).find((p) => p.endsWith("/state.js"));
                const module = await import(path);
                return Function("given", ...Object.keys(module), `return ${expression}`)(given, ...Object.values(module));
            }""",
            [expression, list(given)],
        )

    return run


def test_it_writes_what_it_reads(state):
    points = text((0.3, 0.5, 0.6, 0.5), (1, 0, 1, 0))
    assert state("serialize(parse(given[0]).drags)", points) == points
    assert state("parse(given[0])", "  ") == {"drags": [], "error": None}


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ("{", "not JSON"),
        ("[]", "no list of drags"),
        ('{"version": 2, "drags": []}', "version is not 1"),
        ('{"version": 1, "drags": [{"from": [0, 0]}]}', "drag 1 is not two points"),
        ('{"version": 1, "drags": [{"from": [0, 0], "to": [0, 1.5]}]}', "drag 1 is not two points"),
        ('{"version": 1, "drags": [{"from": [0, 0], "to": [0, true]}]}', "drag 1 is not two points"),
    ],
)
def test_it_says_why_it_cannot_read_a_text(state, points, why):
    assert why in state("parse(given[0]).error", points)


def test_an_end_stops_at_the_border_and_a_whole_arrow_keeps_its_shape_there(state):
    end = state("move([given[0]], {index: 0, part: 'to'}, [0.9, 0.1])[0]", ARROW)
    assert end == {"from": [0.2, 0.3], "to": [1, pytest.approx(0.8)]}
    whole = state("move([given[0]], {index: 0, part: 'both'}, [0.9, -0.9])[0]", ARROW)
    assert whole == {"from": [pytest.approx(0.6), pytest.approx(0)], "to": [pytest.approx(1), pytest.approx(0.4)]}


def test_an_end_is_hit_before_a_shaft_and_the_selected_arrows_end_before_a_nearer_one(state):
    drags = [ARROW, {"from": [0.63, 0.7], "to": [0.9, 0.9]}]
    hit = "hit(given[0], given[1], [100, 100], 10, given[2])"
    assert state(hit, drags, [62, 70], None) == {"index": 1, "part": "from"}
    assert state(hit, drags, [62, 70], {"index": 0, "part": "to"}) == {"index": 0, "part": "to"}
    assert state(hit, drags, [40, 52], None) == {"index": 0, "part": "both"}
    assert state(hit, drags, [10, 90], None) is None


def test_tab_goes_through_all_ends_and_out_both_ways(state):
    drags = [ARROW, {"from": [0.9, 0.9], "to": [0.9, 0.9]}]
    stops = [{"index": 0, "part": "from"}, {"index": 0, "part": "to"}, {"index": 1, "part": "both"}, None]
    before: Any = None
    for stop in stops:
        before = state("nextStop(given[0], given[1], false)", drags, before)
        assert before == stop
    for stop in [*reversed(stops[:3]), None]:
        before = state("nextStop(given[0], given[1], true)", drags, before)
        assert before == stop
    assert state("nextStop(given[0], given[1], false)", drags, {"index": 0, "part": "both"}) == stops[0]


def test_history_goes_back_and_forth_and_follows_what_others_change(state):
    told = state(
        """(() => {
            const history = new History("a"), said = [];
            history.push("b"); history.push("b"); history.push("c");
            said.push(history.undo(), history.undo(), history.undo(), history.redo());
            history.follow("c"); said.push(history.canRedo, history.undo());
            history.push("d"); said.push(history.canRedo);
            history.follow("from elsewhere"); said.push(history.canUndo);
            return said;
        })()"""
    )
    assert told == ["b", "a", "a", "b", False, "b", False, False]


def test_two_hundred_steps_keep_the_last_hundred(state):
    kept = state("(() => { const h = new History('0'); for (let i = 1; i < 200; i++) h.push(`${i}`); return h.texts; })()")
    assert kept == [str(i) for i in range(100, 200)]

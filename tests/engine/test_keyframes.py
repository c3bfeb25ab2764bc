"""Keyframes: a number over the diffusion time, written, or from a list."""

from __future__ import annotations

import pytest
import torch

from rg_engine.errors import TargetError
from rg_engine.guidance import Target
from rg_engine.guidance.keyframes import COLOURS, Keyframes, draw_keyframes, numbers, parse_keyframes, spread


def at(keyframes: Keyframes, percent: float) -> float:
    return float(keyframes.at(percent, 1))


def test_text_is_read_line_by_line_and_by_semicolons():
    text = "\n# layout\n0.0: 1.0\n 0.25 : .5 ; 0.5: 1e-1  # then details\n\n1: 2, 0, 3;\n"
    assert parse_keyframes(text, "hold") == Keyframes(
        points=((0.0, (1.0,)), (0.25, (0.5,)), (0.5, (0.1,)), (1.0, (2.0, 0.0, 3.0))), interpolation="hold"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty: write one a line, such as 0.0: 1.0"),
        ("# nothing\n ; \n", "empty"),
        ("0.0: 1\n0.5", "line 2 .*'0.5': expected a percent, a colon and a value, such as"),
        ("0.0: one", "line 1 .*'0.0: one': expected numbers, such as 0.0: 1.0"),
        ("0.0: 1; : 1", "line 1 .*': 1': expected numbers"),
        ("0.0: 1, , 2", "expected numbers"),
        ("0.0: 1\n\n1.5: 1", "line 3 .*'1.5: 1': expected a percent in 0..1"),
        ("nan: 1", "line 1 .*percent in 0..1"),
        ("0.0: -1", "line 1 .*values of 0 or more"),
        ("0.0: inf", "line 1 .*values of 0 or more"),
        ("0.5: 1\n0.2: 1", "keyframe 2 is at 0.2, not after the one before it, at 0.5: put keyframes in order"),
        ("0.5: 1\n0.5: 2", "keyframe 2 .*one at each percent"),
        ("0.0: 1, 2\n0.5: 1\n1: 1, 2, 3", "2, 1, 3 values: give each one, or as many as pictures"),
    ],
)
def test_a_bad_text_is_refused_with_its_line_and_an_example(text, words):
    with pytest.raises(TargetError, match=words):
        parse_keyframes(text)


def test_unknown_interpolations_are_refused():
    with pytest.raises(TargetError, match="interpolation 'cubic' is unknown: choose one of linear, hold, ease"):
        Keyframes(points=((0.0, (1.0,)),), interpolation="cubic")


def test_the_value_stays_before_the_first_and_after_the_last_keyframe():
    for interpolation in ("linear", "hold", "ease"):
        keyframes = parse_keyframes("0.2: 3\n0.6: 1", interpolation)
        assert [at(keyframes, p) for p in (0.0, 0.2, 0.6, 1.0)] == [3, 3, 1, 1]


def test_between_keyframes_it_goes_straight_holds_or_eases():
    text = "0.2: 3\n0.6: 1"
    assert at(parse_keyframes(text, "linear"), 0.3) == pytest.approx(2.5)
    assert at(parse_keyframes(text, "hold"), 0.599) == 3
    eased = parse_keyframes(text, "ease")
    assert at(eased, 0.4) == pytest.approx(2)
    assert at(eased, 0.3) == pytest.approx(3 - 2 * (3 * 0.25**2 - 2 * 0.25**3))


def test_pictures_of_a_batch_have_values_of_their_own():
    keyframes = parse_keyframes("0: 1, 0\n0.5: 2\n1: 0, 4")
    assert keyframes.pictures == 2
    out = keyframes.at(0.25, 2)
    assert out.dtype == torch.float32
    assert out.tolist() == [1.5, 1.0]
    assert keyframes.at(0.75, 2).tolist() == [1.0, 3.0]
    assert keyframes.most(0.75) == 3.0


def test_one_value_serves_any_batch_and_several_only_their_own():
    parse_keyframes("0: 1\n1: 0").check_batch(7)
    assert parse_keyframes("0: 1\n1: 0").at(0.5, 3).tolist() == [0.5, 0.5, 0.5]
    keyframes = parse_keyframes("0: 1\n1: 0, 1")
    keyframes.check_batch(2)
    for batch, words in ((1, "2 values but 1 picture is being made"), (3, "2 values but 3 pictures are being made")):
        with pytest.raises(TargetError, match=f"keyframe 2, at 1, has {words}: give one value, or one for each"):
            keyframes.check_batch(batch)


def test_a_list_is_spread_over_the_whole_time():
    assert spread([1.0, 0.5, 0.0]) == Keyframes(points=((0.0, (1.0,)), (0.5, (0.5,)), (1.0, (0.0,))))
    assert [at(spread([0.7]), p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.7, 0.7, 0.7])
    assert at(spread([0.0, 1.0], "ease"), 0.25) == pytest.approx(0.15625)
    with pytest.raises(TargetError, match="no keyframes"):
        spread([])
    with pytest.raises(TargetError, match="keyframe 2, at 1, is -1"):
        spread([0, -1])


def test_numbers_come_as_one_a_list_lists_or_a_tensor():
    assert numbers(1) == [1.0]
    assert numbers([0.5, 1]) == [0.5, 1.0]
    assert numbers([[0.5, 1.0]]) == [0.5, 1.0]
    assert numbers([torch.tensor([0.5, 1.0])]) == [0.5, 1.0]
    for wrong in ("0.5", [], [True], [None], {"a": 1}):
        with pytest.raises(TargetError, match="expected a number or a list of numbers"):
            numbers(wrong)


def test_a_drawing_has_a_curve_for_each_picture():
    drawing = draw_keyframes(parse_keyframes("0: 1, 0\n1: 0, 2"))
    assert drawing.shape == (1, 400, 720, 3)
    pixels = {tuple(p) for p in (drawing[0] * 255).round().int().reshape(-1, 3).unique(dim=0).tolist()}
    assert {COLOURS[0], COLOURS[1]} <= pixels
    assert COLOURS[2] not in pixels


def test_a_target_weighs_as_its_keyframes_say(make_head):
    image = torch.rand(1, 8, 8, 3)
    plain = Target(head=make_head(), image=image, weight=0.5)
    assert plain.weight_at(0.3, 4) == 0.5
    target = Target(head=make_head(), image=image, weight=0.5, keyframes=parse_keyframes("0: 1, 2\n1: 0, 0"))
    assert target.weight_at(0.5, 2).tolist() == [0.25, 0.5]
    target.check_batch(2)
    with pytest.raises(
        TargetError, match="keyframes of the target with head 'a_head': keyframe 1, at 0, has 2 values but 3"
    ):
        target.check_batch(3)

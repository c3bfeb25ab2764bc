"""Readout Keyframes, and the weight of a target over the diffusion time."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine, node

pytestmark = pytest.mark.usefixtures("comfyui")

DEFAULT = "0.0: 1.0\n0.5: 0.5"


def keyframes(text=DEFAULT, interpolation="linear", **inputs):
    return node("RG_ReadoutKeyframes", keyframes=text, interpolation=interpolation, **inputs)


def refused(match: str):
    return pytest.raises(engine("errors").TargetError, match=match)


def validate(**inputs):
    import nodes

    return nodes.NODE_CLASS_MAPPINGS["RG_ReadoutKeyframes"].validate_inputs(**inputs)


def test_text_gives_keyframes_and_a_drawing():
    found, preview = keyframes()
    assert found.points == ((0.0, (1.0,)), (0.5, (0.5,)))
    assert preview.shape == (1, 400, 720, 3)
    assert keyframes(interpolation="hold")[0].interpolation == "hold"


@pytest.mark.parametrize(
    "given", [[1.0, 0.5, 0.0], [[1.0, 0.5, 0.0]], torch.tensor([1.0, 0.5, 0.0])], ids=["list", "list in a list", "tensor"]
)
def test_a_list_of_numbers_takes_the_place_of_the_text(given):
    found, _ = keyframes(values=given)
    assert found.points == ((0.0, (1.0,)), (0.5, (0.5,)), (1.0, (0.0,)))


def test_a_single_number_holds_throughout():
    assert keyframes(values=0.25)[0].at(0.7, 2).tolist() == [0.25, 0.25]


def test_a_curve_that_comes_as_a_list_over_a_link_runs_it_once():
    """ComfyUI gives a node that takes lists what each link gave, in a list."""
    import nodes

    assert nodes.NODE_CLASS_MAPPINGS["RG_ReadoutKeyframes"].INPUT_IS_LIST
    for links in ([[1.0, 0.0]], [1.0, 0.0]):
        found, _ = keyframes([DEFAULT], ["hold"], values=links)
        assert found.points == ((0.0, (1.0,)), (1.0, (0.0,)))
        assert found.interpolation == "hold"


def test_the_text_is_checked_before_anything_runs():
    assert validate(keyframes=DEFAULT) is True
    assert validate(keyframes=[DEFAULT]) is True
    assert validate(keyframes=None) is True
    for given in ("0.0: 1\n0.5", ["0.0: 1\n0.5"]):
        assert "line 2 of keyframes is '0.5'" in validate(keyframes=given)
    with refused("line 2 of keyframes"):
        keyframes("0.0: 1\n0.5")


def test_a_target_takes_keyframes(small):
    found, _ = keyframes()
    target = small.target(weight=2.0, keyframes=found)
    assert target.weight_at(0.25, 1).tolist() == [1.5]
    assert small.target(weight=2.0).weight_at(0.25, 1) == 2.0


def test_keyframes_of_another_batch_are_refused(small):
    found, _ = keyframes("0.0: 1, 2")
    with refused("keyframes of the target .*keyframe 1, at 0, has 2 values but 1 picture is being made"):
        small.sample(small.target(keyframes=found))

"""Captions taken apart and altered, and what the referee of attributes sees in pictures of their scenes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rg_engine.demo.measure import load_estimator
from rg_engine.demo.scene_pictures import sample_scenes, scene_pictures
from rg_engine.demo.seen import look
from rg_engine.demo.wording import ATTRIBUTES, read_caption, variants


def test_captions_are_read_as_scenes_write_them():
    for scene in sample_scenes(31, 40):
        assert str(read_caption(scene.caption())) == scene.caption()
    asked = read_caption("a red figure and a blue ball, grey wall")
    assert asked.things == (("red", "figure"), ("blue", "ball"))
    assert asked.wall == "grey"


def test_variants_differ_in_one_attribute():
    own = "a red figure and a blue ball and a green box, grey wall"
    found = variants(own)
    assert tuple(found) == ATTRIBUTES
    assert {name: len(each) for name, each in found.items()} == dict(zip(ATTRIBUTES, (6, 12, 4, 3, 3, 1, 3), strict=True))
    for name in ("figure's colour", "solid's colour", "solid's shape", "wall"):
        for other in found[name]:
            assert sum(a != b for a, b in zip(own.split(), other.split(), strict=True)) == 1
    assert found["sides swapped"] == ("a red figure and a green box and a blue ball, grey wall",)
    assert "a blue figure and a red ball and a green box, grey wall" in found["colours swapped"]
    assert set(variants("a red ball, pink wall")) == {"solid's colour", "solid's shape", "wall"}


@pytest.mark.parametrize("like", ["rendered", "noisy"])
def test_the_referee_sees_what_is_there_and_misses_what_is_not(like):
    drawn = scene_pictures(611, 40)
    pictures = drawn.picture
    if like == "noisy":
        pictures = (pictures + 0.02 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    hits, false = {}, {}
    for seen, caption in zip(look(pictures, load_estimator()), drawn.captions, strict=True):
        for name, found in seen.has(read_caption(caption)).items():
            hits.setdefault(name, []).append(found)
        for name, others in variants(caption).items():
            changed = {"solid's colour": "solids' colours", "solid's shape": "solids' shapes"}.get(name, name)
            if changed in hits and name != "colours swapped":
                before, after = (seen.has(read_caption(each))[changed] for each in (caption, others[0]))
                false.setdefault(changed, []).append(after - before)
    assert {name: round(float(np.mean(each)), 2) for name, each in hits.items() if np.mean(each) < 0.7} == {}
    assert all(np.mean(each) < -0.6 for each in false.values())

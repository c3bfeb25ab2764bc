"""The demo command's pictures of the workflows."""

from __future__ import annotations

import numpy as np
import pytest
from comfyui_host import REPOSITORY, engine


@pytest.fixture
def run(comfyui, tmp_path, monkeypatch):
    """run(name, way of showing it, class of a node, its inputs): the workflow's picture."""
    import folder_paths

    for kind in ("output_directory", "temp_directory"):
        monkeypatch.setattr(folder_paths, kind, str(tmp_path))
    workflow, demo_run = engine("lab.workflow"), engine("lab.demo_run")

    def run(name, way, class_type, **inputs):
        prompt = workflow.read_workflow(REPOSITORY / "example_workflows" / f"{name}.json")
        return getattr(demo_run, way)(workflow.Executor(), workflow.with_inputs(prompt, class_type, **inputs))

    heads = folder_paths.get_filename_list("readout_heads")
    yield run
    assert folder_paths.get_filename_list("readout_heads") == heads


def test_a_training_s_picture_shows_the_loss_the_readouts_and_what_they_steered(run):
    picture = run("train_head", "training_column", "RG_TrainReadoutHead", steps=8, validate_every=4)
    height, width, _ = (pixels := np.asarray(picture)).shape
    assert pixels[:40].mean() > 200  # a plot on white
    guided = pixels[height - width // 4 :]  # four square pictures side by side
    assert guided[:20].mean() > 150  # of the cream wall that was asked for
    readouts = pixels[height - width // 4 - width // 2 : height - width // 4]  # two rows of four
    assert readouts[-width // 4 :].mean() < 60  # poses on black


def test_an_edit_s_picture_shows_the_arrows_and_what_came_of_them(run):
    start, dragged = np.split(np.asarray(run("drag", "edit_row", "RG_ReadoutGuidedKSampler", steps=4)), 2, axis=1)
    assert start.shape == dragged.shape == (256, 256, 3)
    assert not np.array_equal(start, dragged)


def test_optimized_noise_s_picture_shows_what_was_asked_for_before_and_after(run):
    row = np.asarray(run("optimize_noise", "edit_row", "RG_OptimizeNoise", steps=2, updates=2))
    wanted, before, after = np.split(row.astype(int), 3, axis=1)
    assert wanted.shape == after.shape == (256, 256, 3)
    assert np.abs(wanted - before).mean() > 1
    assert np.abs(after - before).mean() > 1


@pytest.mark.parametrize("name", ["optimize_text", "optimize_look"])
def test_a_clip_loss_s_picture_shows_before_and_after(run, name):
    row = np.asarray(run(name, "edit_row", "RG_OptimizeNoise", steps=2, updates=2)).astype(int)
    *_, before, after = np.split(row, row.shape[1] // row.shape[0], axis=1)
    assert before.shape == (256, 256, 3)
    assert np.abs(after - before).mean() > 1


def test_a_guided_model_s_picture_shows_the_pose_and_what_each_strength_made_of_it(run):
    engine("lab.workflow").load_comfyui_nodes("nodes_latent.py")
    pose, *made = np.split(np.asarray(run("apply", "edit_row", "KSamplerAdvanced", steps=4)), 5, axis=1)
    assert (pose.max(-1) < 30).mean() > 0.8  # bones on black
    assert all(each[:20].mean() > 150 for each in made)  # the cream wall that was asked for
    changes = [np.abs(each.astype(int) - made[0]).mean() for each in made[1:]]
    assert min(changes) > 1  # levels of 255, from the picture that is not guided


def test_a_boundary_s_picture_shows_the_plot_the_strip_and_walls_that_turn(run):
    import folder_paths

    saved = folder_paths.get_filename_list("readout_boundaries")
    pixels = np.asarray(run("boundary", "training_column", "RG_FitBoundary", mixing_step=400, steps=6))
    assert pixels[:40].mean() > 200  # a plot on white
    row = pixels[-pixels.shape[1] // 9 :][:12]  # the walls of three pictures: darker, as they are, brighter
    darker, own, brighter = (part.mean() for part in np.split(row, 3, axis=1))
    assert darker < own < brighter
    assert folder_paths.get_filename_list("readout_boundaries") == saved

"""The benchmark measures what it says; many guided runs in one process leave nothing behind."""

from __future__ import annotations

import gc
import json
import logging

import pytest
import torch
from comfyui_host import engine

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def benchmark():
    """The module; what it sets for the whole process is put back."""
    import comfy.utils

    level, bars = logging.getLogger().level, comfy.utils.PROGRESS_BAR_ENABLED
    yield engine("lab.cost.benchmark")
    logging.getLogger().setLevel(level)
    comfy.utils.set_progress_bar_enabled(bars)


def test_a_row_for_each_way_on_screen_and_in_the_file(benchmark, tmp_path, capsys):
    ways = ["plain", "fast", "fast, light graph", "ControlNet"]
    report = benchmark.run_benchmark(tmp_path / "new folder", ["demo"], 1, "auto", ways, pictures=[2], counted=["demo"])
    assert report["device"] == "cpu"
    assert report["dtype"] == "torch.float32"
    rows = report["demo"]["ways"]
    assert list(rows) == ways
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert rows["plain"]["ratio"] == 1
    kept = {way: row["bytes kept"] for way, row in rows.items()}
    assert kept["plain"] == kept["ControlNet"] == 0
    assert 0 < kept["fast, light graph"] < kept["fast"]
    assert list(report["demo"]["pictures"]) == [2]
    counted = {row["a step"]: row["operations"] for row in report["demo, counted"]}
    assert 1 == counted["plain"] < counted["fast"] < min(counted["fast, 3 heads"], counted["reference"])
    assert json.loads((tmp_path / "new folder" / "benchmark.json").read_text()) == json.loads(json.dumps(report))
    printed = capsys.readouterr().out
    assert all(f"\n{way} " in printed for way in ways)


def test_the_precision_that_was_asked_for(benchmark, tmp_path):
    assert benchmark.run_benchmark(tmp_path, ["demo"], 1, "bfloat16", ["plain"])["dtype"] == "torch.bfloat16"


def test_tries_count_passes_and_leave_the_engine_as_it_was(benchmark):
    tries, step = engine("lab.cost.tries"), engine("comfy_host.guided.step")
    move = step._move
    names = (tries.BASE, "unguided", "feature target, 3 steps", "negative prompt kept", "momentum 0.3", "Polyak's length, 1")
    world = engine("lab.demo_world").load_world(2)
    rows = tries.measure_tries(world, {name: tries.TRIES[name] for name in names}, ("demo_pose",))
    assert step._move is move
    found = {row["try"]: (row["passes"], row["backward"], row["head"]) for row in rows}
    assert list(found) == list(names)
    assert found[tries.BASE] == found["momentum 0.3"] == (60, 5, 5)
    assert found["unguided"] == (60, 0, 0)
    assert found["feature target, 3 steps"] == (60, 5, 15)
    assert found["negative prompt kept"] == (56, 5, 5)
    assert rows[0]["of default"] == rows[1]["SD1.5"] == 1
    errors = {row["try"]: row["pose"] for row in rows}
    assert len(set(errors.values()) - {errors[tries.BASE]}) >= 4  # each idea makes other pictures; a prompt kept, hardly
    assert max(errors.values()) == errors["unguided"] > 3 * errors[tries.BASE]


def test_directions_and_lengths_that_were_tried():
    tries = engine("lab.cost.tries")
    first, second = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    before = []
    extrapolated = tries.extrapolation(0.5)
    torch.testing.assert_close(extrapolated(first, before), tries._unit(first))
    wanted = 1.5 * tries._unit(second) - 0.5 * tries._unit(first)
    torch.testing.assert_close(extrapolated(second, before), wanted)
    torch.testing.assert_close(tries.momentum(0.5)(second, [first]), tries._unit(second) + 0.5 * first)
    cells = tries.by_cell(1.0)(first, []).square().mean(1).sqrt()
    torch.testing.assert_close(cells, torch.ones_like(cells), atol=0.01, rtol=0)
    channels = tries.by_channel(first, []).square().mean((2, 3)).sqrt()
    torch.testing.assert_close(channels, torch.ones_like(channels))
    assert tries.sloped(1.4, 0.6)(None, 0.25, first, 1.0) == pytest.approx(1.0)


def state(model) -> list:
    """What a ModelPatcher, its model and every module of its network hold, by name, and what is hooked to them."""
    found = [sorted(model.__dict__), sorted(model.model.__dict__), repr(model.wrappers), sorted(model.model_options)]
    for name, module in model.model.named_modules():
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
        parameters = [id(p) for p in module._parameters.values()]
        found.append((name, sorted(module.__dict__), [len(each) for each in hooks], parameters))
    return found


def count_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.fixture
def runs(benchmark, monkeypatch):
    """A small model, and a function that samples a model three steps in some way of the benchmark's."""
    models = engine("lab.cost.models")
    monkeypatch.setattr(benchmark, "STEPS", 3)
    shape = models.SHAPES["demo"]
    model = models.random_model(shape, torch.float32)
    heads = models.random_heads(model, shape, 1)
    conds = [models.random_conds(model, shape, seed) for seed in (1, 2)]

    def run(model, **way):
        benchmark.step_seconds(model, benchmark.Way(**way), heads, conds, models.zero_latent(shape, 1))

    run(model)  # loads it
    return model, run


def test_twenty_guided_runs_leave_nothing_behind(runs):
    import comfy.model_management

    model, run = runs
    before, tensors, loaded = state(model), [], []
    for number in range(20):
        run(model, heads=1, graph=("full", "light")[number % 2])
        if number in (10, 13, 16, 19):
            tensors.append(count_tensors())
            loaded.append(len(comfy.model_management.current_loaded_models))
    assert state(model) == before
    assert tensors == [tensors[0]] * 4
    assert loaded == [loaded[0]] * 4


@pytest.mark.parametrize("graph", ["full", "light"])
def test_guided_runs_with_other_nodes_patches_leave_nothing_behind(runs, graph):
    """Beside patches, which may write in place, what is saved for backward goes through hooks of ours."""
    model, run = runs
    patched = model.clone()
    patched.set_model_attn1_patch(lambda n, context, value, options: (n * 1.1, context, value))
    tensors = []
    for _ in range(3):
        run(patched, heads=1, graph=graph)
        tensors.append(count_tensors())
    assert tensors == [tensors[0]] * 3

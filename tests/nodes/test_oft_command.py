"""``python -m rg_engine train-oft``: an adapter from folders, on one process and on two, and after a break."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from comfyui_host import engine
from command_line import run
from PIL import Image

STEPS = 4


def config(folder: Path, out: str, **changed: object) -> Path:
    values = {
        "out": out, "pictures": "pictures", "prompt": "captions", "class_pictures": "class", "class_prompt": "a figure",
        "size": 64, "steps": STEPS, "batch": 4, "learning_rate": "1e-3", "blocks": 8, "coft_eps": "1e-3", "validation_share":
        0.25, "validate_every": 2, "device": "cpu", **changed,
    }  # fmt: skip
    path = folder / f"{Path(out).stem}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in values.items()), encoding="utf-8")
    return path


def losses(log: Path) -> list[float]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [value for line in lines for value in (line["loss"], line["validation"]) if value is not None]


@pytest.fixture(scope="module")
def data(_started_comfyui: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pictures/ with captions, and class/, of scenes of the demo world."""
    folder = tmp_path_factory.mktemp("data")
    drawn = engine("demo.scene_pictures").scene_pictures(3, 8)
    for i, picture in enumerate(drawn.picture.numpy()):
        where = folder / ("pictures" if i < 4 else "class")
        where.mkdir(exist_ok=True)
        Image.fromarray((picture * 255).astype(np.uint8)).save(where / f"{i}.png")
        (where / f"{i}.txt").write_text(drawn.captions[i], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def alone(data: Path) -> Path:
    """The folder that one process wrote into."""
    ended = run("rg_engine", "train-oft", "--config", str(config(data, "one/subject.safetensors")))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.strip().endswith("subject.safetensors")
    return data / "one"


def test_an_adapter_is_trained_from_folders(comfyui, alone):
    adapter = engine("adapters").load_adapter(alone / "subject.safetensors")
    assert (adapter.layout, adapter.sides) == ("native", {"in"})
    assert adapter.facts["steps"] == STEPS
    assert adapter.facts["model"] == "demo"
    assert all(loss > 0 for loss in losses(alone / "subject.jsonl"))
    assert sorted(path.name for path in alone.iterdir()) == ["subject.jsonl", "subject.png", "subject.safetensors"]


def test_two_processes_have_the_loss_curve_and_the_adapter_of_one(comfyui, data, alone):
    path = config(data, "two/subject.safetensors")
    ended = run(
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "rg_engine",
        "train-oft",
        "--config",
        str(path),
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert losses(data / "two" / "subject.jsonl") == pytest.approx(losses(alone / "subject.jsonl"), rel=1e-5)
    load = engine("adapters").load_adapter
    one, two = (load(data / folder / "subject.safetensors") for folder in ("one", "two"))
    for a, b in zip(one.layers, two.layers, strict=True):
        difference = (a.rotation.q - b.rotation.q).abs().max()
        assert float(difference) <= 1e-3 * float(a.rotation.q.abs().max()) + 1e-6


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"stepps": 3}, "settings that don't exist: stepps"),
        ({"class_prompt": '""'}, "give both, or neither"),
        ({"pictures": "nowhere"}, "there is no folder"),
        ({"layers": "all"}, "expected one of attention"),
        ({"model": "missing.safetensors"}, "there is no checkpoint"),
    ],
)
def test_a_bad_config_is_told_in_a_line(data, changed, match):
    path = config(data, "bad/subject.safetensors", **changed)
    if "model" in changed:
        ended = run("rg_engine", "train-oft", "--config", str(path))
        assert ended.returncode == 2
        assert match in ended.stderr
        assert "Traceback" not in ended.stderr
    else:
        with pytest.raises(engine("errors").TrainingError, match=match):
            engine("adapters.learning.config").read_oft_config(path)
    assert not (data / "bad").exists()

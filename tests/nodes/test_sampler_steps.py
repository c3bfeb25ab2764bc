"""Which of a sampler's model calls is guided. That real samplers make these calls: test_matrix.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from comfyui_host import engine

pytestmark = pytest.mark.usefixtures("comfyui")
SIGMAS = [float(sigma) for sigma in range(30, -1, -1)]


class OnTheDevice:
    """A sigma that notes when its value is asked for."""

    def __init__(self, value: float, asked: list[float]) -> None:
        self.value, self.asked = value, asked

    def __float__(self) -> float:
        self.asked.append(self.value)
        return self.value


@pytest.mark.parametrize(("name", "between"), [("sample_euler", []), ("sample_dpm_2", [0.5]), ("sample_heun", [1.0])])
def test_a_step_is_guided_once_and_the_device_waited_for_in_guided_steps_only(name, between):
    """Once the sampler has been seen to follow its schedule, which its second step shows. between: how far into the next
    step a sampler calls the model again, after its callback."""
    guidance, steps = engine("guidance"), engine("comfy_host.guided.sampler_steps")
    plan = guidance.make_plan([(0.0, 0.5)], SIGMAS, guidance.GuidanceSettings(), lambda percent: 30 * (1 - percent))
    followed = steps.SamplerSteps(plan, SIGMAS)
    asked: list[float] = []
    found = []
    for sigma in SIGMAS[:-1]:
        found.append(followed.planned(OnTheDevice(sigma, asked)))
        followed.finished_step()
        found += [followed.planned(OnTheDevice(sigma - part, asked)) for part in between]
    assert [planned for planned in found if planned] == list(plan.steps)
    assert followed.missed == 0
    guided = {planned.sigma for planned in plan.steps}
    assert len(guided) == 5
    followed_by = guided | {SIGMAS[1]}
    assert set(asked) <= followed_by | {sigma + 1 - part for sigma in followed_by for part in between}

"""What training descends along: the gradient of every loss is held to finite differences of that loss, in float64."""

import pytest
import torch
from models import make_kernels, make_model, recorded, tokens

from less_fast import H2O, Retention
from less_fast.hf.architecture import attention_modules, sizes
from less_fast.layer.parallel import dense, eviction_times, exact_part
from less_fast.setting import Setting
from less_fast.training import retention, sensitivity
from less_fast.training.joint import divergence, times_in_stream
from less_fast.training.layers import loss
from less_fast.training.recording import Recorded
from less_fast.training.together import share_left

STEP = 1e-6  # the difference's own error is of the order of its square
EVERY_FAMILY = pytest.mark.parametrize("family", ["paper", "exponential"])


def assert_gradient(value, weights, least=1e-6):
    """The slope of value() along a random direction of each weight by itself, by backpropagation and by central differences.

    least: slopes below that of all weights' largest would be lost in rounding.
    """
    weights = dict(weights)
    for weight in weights.values():
        weight.requires_grad_()
    found, generator, slopes = torch.autograd.grad(value(), [*weights.values()]), torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        for (name, weight), gradient in zip(weights.items(), found):
            direction = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            here, ends = weight.clone(), []
            for sign in (1, -1):
                weight.copy_(here + sign * STEP * direction)
                ends.append(value().item())
            weight.copy_(here)
            slopes[name] = (gradient * direction).sum().item(), (ends[0] - ends[1]) / (2 * STEP)
    largest = max(abs(measured) for _, measured in slopes.values())
    for name, (said, measured) in slopes.items():
        assert abs(measured) > least * largest, name
        assert said == pytest.approx(measured, rel=1e-3, abs=1e-8 * largest), name


@EVERY_FAMILY
@pytest.mark.parametrize("policy", [H2O(2, 2), Retention(4, 1)])
def test_the_joint_stage_descends_through_the_queries_keys_and_values_of_later_layers(policy, family):
    """What is evicted stays as it is: it is no function that has a slope."""
    model, ids = make_model(), tokens(3, 16)
    kernels = make_kernels(model, family=family, rho=2)
    setting = Setting.of(sizes(model), range(3), policy, kernels, "uniform")
    times = times_in_stream(model, ids, setting)
    assert [*times] == [0, 1, 2]
    weights = {name: weight for name, weight in kernels.named_parameters() if ".rho." not in name}
    assert_gradient(lambda: divergence(model, ids, setting, times), weights)

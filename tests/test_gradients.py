"""What training descends along: the gradient of every loss is held to finite differences of that loss, in float64."""

from functools import partial

import pytest
import torch
from models import make_kernels, make_model, tokens
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from less_fast import H2O, Retention
from less_fast.hf.architecture import sizes
from less_fast.hf.seam import predictions
from less_fast.layer.parallel import dense
from less_fast.setting import Setting
from less_fast.training import retention, sensitivity
from less_fast.training.joint import divergence
from less_fast.training.layers import bare_of, costs

STEP = 1e-5  # the difference's own error is of the order of its square; the largest error of a slope is 3e-6 of it
EVERY_FAMILY = pytest.mark.parametrize("family", ["paper", "exponential"])


def make_exact_model():
    """In float64 throughout: the norms of transformers round to float32, in which a small difference has few digits."""
    model = make_model()
    for norm in (module for module in model.modules() if isinstance(module, LlamaRMSNorm)):
        norm.forward = partial(rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=norm.variance_epsilon)
    return model


def make_moved_kernels(model, family):
    """With rho, and no weight at zero: from there some others have no slope."""
    kernels = make_kernels(model, family=family, rho=2)
    torch.manual_seed(2)
    for layer in kernels.layers:
        for weight in (layer.q2, layer.k2):
            torch.nn.init.normal_(weight, std=0.3)
    return kernels


def assert_gradient(value, weights):
    """The slope of value() along a random direction of each weight by itself, by backpropagation and by central differences."""
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
        assert abs(measured) > 1e-5 * largest, name  # or it would be lost in rounding
        assert said == pytest.approx(measured, rel=1e-4, abs=1e-7 * largest), name


def without_rho(features):
    return [(name, weight) for name, weight in features.named_parameters() if "rho." not in name]


@EVERY_FAMILY
@pytest.mark.parametrize("policy", [H2O(2, 2), Retention(4, 1)])
def test_the_joint_stage_descends_through_the_queries_keys_and_values_of_later_layers(policy, family):
    """What is evicted stays as it is: it is no function that has a slope."""
    model, ids = make_exact_model(), tokens(3, 16)
    kernels = make_moved_kernels(model, family)
    setting = Setting.of(sizes(model), range(3), policy, kernels, "uniform")
    assert_gradient(lambda: divergence(model, ids, setting), without_rho(kernels))


@EVERY_FAMILY
@pytest.mark.parametrize("by_gradient", [False, True], ids=["the paper's error", "what it costs the predictions"])
def test_layers_descend_along_what_less_costs(by_gradient, family):
    """And the gradient's loss is that over what the bare policy costs, which does not depend on the kernels."""
    model, policy = make_model(), H2O(2, 2)
    layer = sensitivity.watch(model, tokens(3, 16), 0, by_gradient)[1]
    kernels = make_moved_kernels(model, family)
    setting = Setting.of(sizes(model), range(3), policy, kernels, "uniform")
    bare = bare_of({1: layer}, setting)[1]
    assert_gradient(lambda: costs(layer, bare, setting, 1)[0], without_rho(kernels.layers[1]))
    assert not costs(layer, bare, setting, 1)[1].requires_grad


def test_rho_descends_along_its_cross_entropy():
    model = make_model()
    layer, rho = retention.watch(model, tokens(1, 16), seed=0)[1], make_kernels(model, rho=2).layers[1].rho
    assert_gradient(lambda: layer.cross_entropy(rho), rho.named_parameters())


def test_what_a_layers_output_weighs_is_the_gradient_of_the_labels_that_were_drawn(monkeypatch):
    """g: of log p of each sample, by the attention output of every layer that LESS serves."""
    model, ids, draw, drawn = make_exact_model(), tokens(3, 16), torch.multinomial, []
    monkeypatch.setattr(torch, "multinomial", lambda *rest, **more: drawn.append(draw(*rest, **more)) or drawn[-1])
    layers = sensitivity.watch(model, ids, seed=0)
    labels, generator = drawn[0].view(3, 16, -1), torch.Generator().manual_seed(0)
    assert [*layers] == [0, 1, 2]
    for index, layer in layers.items():
        direction = torch.randn(layer.full.shape, generator=generator, dtype=torch.float64)

        def moved(one, *qkv, index=index, direction=direction, by):
            return dense(*qkv) + by * direction * (one == index)

        with torch.no_grad():
            ends = [predictions(model, ids, partial(moved, by=by)).gather(2, labels).sum((0, 1)) for by in (STEP, -STEP)]
        slopes = (ends[0] - ends[1]) / (2 * STEP)  # (samples,)
        assert (layer.g * direction[:, None]).sum((0, 2, 3, 4)).tolist() == pytest.approx(slopes.tolist(), rel=1e-6)

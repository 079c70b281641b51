"""`model.generate(..., custom_generate=FOLDER)`: the folder gives generation a LessCache, made of the arguments beside it."""

import pytest
import torch
from caches import FASTGEN, KINDS, generate, left_padded
from models import make_kernels, make_model, tokens

from less_fast import H2O, Lambda, LessCache, LessError, LessKernels, Retention, SnapKV, kernels_for
from less_fast.hf import CUSTOM_GENERATE
from less_fast.loading import load_model

TABLE = [[3, 9], [5, 5], [12, 2]]


@pytest.fixture(autouse=True)
def modules_of_transformers(tmp_path, monkeypatch):
    """transformers copies such folders to a place in the user's home, and imports them from there."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


def constant(model, ids, mask=None, **options):
    return generate(model, ids, None, mask, custom_generate=CUSTOM_GENERATE, trust_remote_code=True, **options)


def test_without_arguments_it_is_the_best_that_comes_with_the_package():
    model, tokenizer = load_model("")
    ids = tokenizer("def read_lines(path):\n    with open(path) as file:\n" * 4, return_tensors="pt")["input_ids"]
    out = constant(model, ids, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, LessCache)
    cache = LessCache.for_model(model, Retention(64, 8), kernels_for(model))
    assert torch.equal(generate(model, ids, cache), out.sequences)
    assert out.past_key_values.memory() == cache.memory()
    assert out.past_key_values.setting.budgets == cache.setting.budgets
    assert not torch.equal(constant(model, ids, policy="h2o", budget=4), out.sequences)


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        (dict(policy="h2o", budget=6, kernels=None), dict(policy=H2O(3, 3))),
        (dict(policy="lambda", budget=9, kernels=None), dict(policy=Lambda(4, 5))),
        (dict(policy=H2O(2, 2), kernels=None), dict(policy=H2O(2, 2))),
        (dict(policy=H2O(2, 2), budget=8, kernels=None), dict(policy=H2O(4, 4))),
        (dict(policy=H2O(2, 2), kernels="OURS", chunk=4), dict(policy=H2O(2, 2), kernels="OURS", chunk=4)),
        (dict(policy=H2O(2, 2), kernels="FOLDER"), dict(policy=H2O(2, 2), kernels="OURS")),
        (dict(budget=6, int8=True), dict(policy=SnapKV(6, 1, 3), int8=True)),
        (dict(budget=6, kernels="FOLDER"), dict(policy=H2O(3, 3), kernels="OURS")),
        (dict(budget=4, budgets=TABLE), dict(policy=SnapKV(4, 1, 3), budgets=TABLE)),
        (dict(policy=FASTGEN, kernels=None, token_kinds=KINDS), dict(policy=FASTGEN, token_kinds=KINDS)),
    ],
    ids=lambda value: " ".join(value),
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_its_arguments_are_those_of_a_cache_and_all_others_go_to_generate(arguments, made, options, tmp_path):
    model = make_model()
    kernels = make_kernels(model)
    kernels.save_pretrained(tmp_path / "kernels")
    places = {"OURS": LessKernels.from_pretrained(tmp_path / "kernels"), "FOLDER": str(tmp_path / "kernels")}
    filled = [{name: places.get(x, x) if isinstance(x, str) else x for name, x in given.items()} for given in (arguments, made)]
    ids, mask = left_padded([25, 14], 25)
    told = constant(model, ids, mask, **filled[0], **options, return_dict_in_generate=True)
    out, cache = told.sequences, LessCache.for_model(model, **filled[1])
    for name in ("policy", "budgets", "chunk", "int8"):
        assert getattr(told.past_key_values.setting, name) == getattr(cache.setting, name)
    assert torch.equal(out, generate(model, ids, cache, mask, **options))
    assert not torch.equal(out, generate(model, ids, None, mask, **options))


def test_what_cannot_be_is_refused_in_one_sentence():
    model = make_model()
    with pytest.raises(LessError, match="no policy is called 'h3o'"):
        constant(model, tokens(1, 9), policy="h3o")
    cache = LessCache.for_model(model, H2O(2, 2))
    with pytest.raises(LessError, match="leave past_key_values out, or custom_generate"):
        generate(model, tokens(1, 9), cache, custom_generate=CUSTOM_GENERATE, trust_remote_code=True)

"""A cache that was saved goes on bit for bit, forks, and refuses every file that is not what was written."""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import pytest
import torch
from caches import FASTGEN, KINDS, feed, generate, left_padded
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_kernels, make_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from less_fast import H2O, TOVA, LessCache, LessError, LessKernels, Policy, Scissorhands, SnapKV
from less_fast.demo import KERNELS, MODEL
from less_fast.files import digest, read, save_state, write
from less_fast.measuring.caches import full_bytes, held_bytes
from less_fast.training.head_costs import measure
from paper_checks.architectures import tiny

TABLE = [[3, 9], [5, 5], [12, 1]]


def saved(path, model=None, kernels=None, policy=H2O(3, 4), prompt=None, mask=None, **options):
    model = model or make_model()
    cache = LessCache.for_model(model, policy, kernels, token_kinds=KINDS, **options)
    ids = tokens(2, 15) if prompt is None else prompt
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.save(path)
    return model, cache


@pytest.mark.parametrize("policy", [H2O(3, 4), TOVA(6), Scissorhands(6, 2, 5), SnapKV(6, 3, 1), FASTGEN], ids=repr)
@pytest.mark.parametrize("options", [{}, dict(chunk=4), dict(int8=True)], ids=str)
def test_a_loaded_cache_goes_on_bit_for_bit(tmp_path, policy, options):
    kernels = make_kernels(make_model())
    model, cache = saved(tmp_path / "cache", kernels=kernels, policy=policy, **options)
    loaded = LessCache.load(tmp_path / "cache", model, kernels)
    assert loaded.memory() == cache.memory()
    assert int(loaded.get_seq_length()) == 15
    more = tokens(2, 20, seed=1)
    assert torch.equal(feed(model, more, loaded, prompt=9), feed(model, more, cache, prompt=9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_ranks_padding_and_dtypes_are_kept(tmp_path, dtype):
    model = make_model().to(dtype)
    kernels = make_kernels(model, rank=[4, 2, 5], family="exponential").float()
    ids, mask = left_padded([15, 6], 15)
    _, cache = saved(tmp_path / "cache", model, kernels, prompt=ids, mask=mask, budgets=TABLE)
    loaded = LessCache.load(tmp_path / "cache", model, kernels)
    held = [[policy.budget for policy in layer.state.policies()] for layer in loaded.layers]
    assert held == TABLE
    for one, other in zip(loaded.layers, cache.layers):
        for (name, a), (_, b) in zip(one.state.tensors().items(), other.state.tensors().items(), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_cache_knows_what_a_full_one_would_hold(tmp_path, dtype, int8):
    model, cache = saved(tmp_path / "cache", make_model().to(dtype), int8=int8)
    loaded = LessCache.load(tmp_path / "cache", model)
    assert full_bytes(loaded) == full_bytes(cache) == 3 * 2 * 2 * 2 * 15 * 8 * dtype.itemsize  # layers, k and v, N, Hkv, T, D
    assert {layer.dtype for layer in loaded.less_layers} == {dtype}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_what_a_full_cache_would_hold_is_what_it_holds_after_the_same_pass_pads_and_all(name):
    model, (ids, mask) = tiny(name), left_padded([15, 6], 15)
    ours, full = LessCache.for_model(model, H2O(3, 4)), DynamicCache(config=model.config)
    with torch.no_grad():
        for cache in (ours, full):
            model(ids, attention_mask=mask, past_key_values=cache)
    assert full_bytes(ours) == held_bytes(full) > held_bytes(ours)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "falcon", "gpt2", "modernbert-decoder"])
def test_other_architectures_are_saved_with_the_layers_that_are_their_own(tmp_path, name):
    model = tiny(name)
    _, cache = saved(tmp_path / "cache", model)
    loaded = LessCache.load(tmp_path / "cache", model)
    more = tokens(2, 12, seed=1)
    assert torch.equal(feed(model, more, loaded, prompt=5), feed(model, more, cache, prompt=5))


def test_a_stored_prompt_forks_into_continuations_that_do_not_meet(tmp_path):
    kernels, prompt = make_kernels(make_model()), tokens(1, 15)
    model, _ = saved(tmp_path / "prompt", kernels=kernels, prompt=prompt)
    turns = [torch.cat([prompt, tokens(1, 4, seed=seed)], 1) for seed in (1, 2, 3)]
    alone = [generate(model, turn, LessCache.load(tmp_path / "prompt", model, kernels)) for turn in turns]
    fork = LessCache.load(tmp_path / "prompt", model, kernels)
    fork.batch_repeat_interleave(3)
    together = generate(model, torch.cat(turns), fork)
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(alone[0][:, 19:], alone[1][:, 19:])


def test_a_cache_that_has_seen_nothing_is_saved_too(tmp_path):
    model = make_model()
    LessCache.for_model(model, H2O(3, 4)).save(tmp_path / "empty")
    loaded, fresh = LessCache.load(tmp_path / "empty", model), LessCache.for_model(model, H2O(3, 4))
    assert torch.equal(generate(model, tokens(2, 9), loaded), generate(model, tokens(2, 9), fresh))


def test_another_process_goes_on_where_this_one_stopped(tmp_path):
    model, kernels = AutoModelForCausalLM.from_pretrained(MODEL).eval(), LessKernels.from_pretrained(KERNELS)
    prompt = torch.arange(100, 160)[None]
    cache = LessCache.for_model(model, H2O(6, 6), kernels)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    cache.save(tmp_path / "prompt")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\nfrom less_fast import LessCache, LessKernels\n"
        "from less_fast.demo import KERNELS, MODEL\ntorch.set_num_threads(1)\n"
        "model = AutoModelForCausalLM.from_pretrained(MODEL).eval()\n"
        "cache = LessCache.load(sys.argv[1], model, LessKernels.from_pretrained(KERNELS))\n"
        "ids = torch.arange(100, 165)[None]\n"
        "print(model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)[0].tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code, tmp_path / "prompt"], check=True, capture_output=True, text=True).stdout
    wanted = model.generate(torch.arange(100, 165)[None], past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert json.loads(said) == wanted[0].tolist()


# What is not what was written is refused.


@given(at=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=60)
def test_a_file_with_one_flipped_bit_or_without_its_end_is_refused(at, bit, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("broken") / "cache"
    write(path, {"a": torch.arange(7.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, {"x": [1, "y"]})
    content = bytearray(path.read_bytes())
    place = min(int(at * len(content)), len(content) - 1)
    content[place] ^= 1 << bit
    path.write_bytes(content[:place] if cut else content)
    try:
        tensors, about = read(path)
    except ValueError:
        return
    assert about == {"x": [1, "y"]}  # a bit that says nothing, of the padding or of JSON's white space
    assert torch.equal(tensors["a"], torch.arange(7.0))
    assert torch.equal(tensors["b"], torch.ones(2, 3, dtype=torch.bfloat16))


def edited(path, change):
    """The same file with other metadata or tensors, as another program would write it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


def other_tensor(metadata, tensors):
    tensors["0.0.k"][0, 0, 0] += 1


def other_text(metadata, tensors):
    metadata["about"] = metadata["about"].replace('"chunk": null', '"chunk": 4')


def other_version(metadata, tensors):
    metadata["less-kv state"] = "1"


def no_metadata(metadata, tensors):
    metadata.clear()


def no_checksum(metadata, tensors):
    del metadata["sha256"]


def no_checksum_and_another_tensor(metadata, tensors):
    no_checksum(metadata, tensors)
    other_tensor(metadata, tensors)


def empty_checksum(metadata, tensors):
    metadata["sha256"] = ""


def said(text):
    """Another text, or none, under a right checksum."""

    def change(metadata, tensors):
        del metadata["about"]
        metadata |= {} if text is None else {"about": text}
        metadata["sha256"] = digest(tensors, text or "")

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (other_tensor, "not as it was written"),
        (other_text, "not as it was written"),
        (other_version, "of version 1, and this program reads 4"),
        (no_metadata, "no state of a cache"),
        (no_checksum, "not as it was written"),
        (no_checksum_and_another_tensor, "not as it was written"),
        (empty_checksum, "not as it was written"),
        *((said(text), "does not say what it holds") for text in (None, "", "no JSON", "{", "[1]", '"model"', "null")),
    ],
)
def test_edited_and_foreign_files_are_refused(tmp_path, change, match):
    model, _ = saved(tmp_path / "cache")
    edited(tmp_path / "cache", change)
    with pytest.raises(ValueError, match=match):
        LessCache.load(tmp_path / "cache", model)


def test_files_that_are_no_caches_are_refused(tmp_path):
    model, cache = saved(tmp_path / "cache")
    (tmp_path / "text").write_text("no safetensors")
    save_state(cache.layers[0].state, tmp_path / "layer")
    with pytest.raises(ValueError, match="no state of a cache, or not all of it"):
        LessCache.load(tmp_path / "text", model)
    with pytest.raises(ValueError, match="no state of a cache, or not all of it"):
        LessCache.load(tmp_path, model)
    with pytest.raises(ValueError, match=r"load it with less_fast\.load_state"):
        LessCache.load(tmp_path / "layer", model)
    with pytest.raises(FileNotFoundError):
        LessCache.load(tmp_path / "nothing", model)


def test_another_model_other_kernels_and_an_unknown_policy_are_refused(tmp_path):
    kernels = make_kernels(make_model())
    model, _ = saved(tmp_path / "cache", kernels=kernels)
    twin, others = make_model(), make_kernels(make_model())
    with torch.no_grad():
        twin.model.layers[1].self_attn.k_proj.weight.mul_(1.05)
        others.layers[0].k3.add_(1)
    for wrong in (twin, make_model(num_hidden_layers=2), make_model().float()):
        with pytest.raises(ValueError, match="was saved with another model"):
            LessCache.load(tmp_path / "cache", wrong, kernels)
    for wrong in (None, others):
        with pytest.raises(ValueError, match="with other kernels"):
            LessCache.load(tmp_path / "cache", model, wrong)
    saved(tmp_path / "bare", model)
    with pytest.raises(ValueError, match="without kernels"):
        LessCache.load(tmp_path / "bare", model, kernels)
    tensors, about = read(tmp_path / "bare")
    write(tmp_path / "bare", tensors, about | {"policy": ["Unheard", {}]})
    with pytest.raises(ValueError, match="policy Unheard, which is not there"):
        LessCache.load(tmp_path / "bare", model)


def test_a_cache_of_shipped_kernels_finds_them_again(tmp_path):
    model, ids = AutoModelForCausalLM.from_pretrained(MODEL).eval(), torch.arange(5, 65)[None]
    cache = LessCache.for_model(model, budget=20)
    feed(model, ids, cache, prompt=50)
    cache.save(tmp_path / "cache")
    again, other = (LessCache.load(tmp_path / "cache", model) for _ in "12")
    assert cache.setting.kernels
    assert torch.equal(feed(model, ids, again, prompt=5), feed(model, ids, cache, prompt=5))
    assert LessCache.join([cache, again, other]).lengths.tolist() == [120, 120, 60]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight *= 2
    with pytest.raises(LessError, match="was saved with another model"):
        LessCache.load(tmp_path / "cache", model)


def test_a_fine_tune_of_the_model_is_another_model_and_its_own_copy_is_not(tmp_path):
    saved(tmp_path / "cache")
    LessCache.load(tmp_path / "cache", make_model())
    tuned = make_model()
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * 0.05)
    with pytest.raises(ValueError, match="was saved with another model"):
        LessCache.load(tmp_path / "cache", tuned)


@dataclass(frozen=True)
class Odd(Policy):
    """Keeps the last tokens, and says so in an odd way."""

    budget: int
    field: object = (1, 2)

    def rank(self, position, score, n):
        return position


def test_policies_of_ones_own_are_saved_if_they_can_be_written(tmp_path):
    model, _ = saved(tmp_path / "cache", policy=Odd(6))
    assert LessCache.load(tmp_path / "cache", model).layers[0].policy == Odd(6)
    with pytest.raises(ValueError, match="cannot be written to a file: not all of its fields"):
        saved(tmp_path / "other", model, policy=Odd(6, frozenset()))
    assert not (tmp_path / "other").exists()


def test_a_shipped_name_means_the_shipped_policy_whoever_else_bears_it(tmp_path):
    model, _ = saved(tmp_path / "cache", policy=H2O(3, 3))
    kernels = LessKernels.from_pretrained(KERNELS)
    table = kernels.budgets_for(H2O(26, 25))
    own = make_dataclass("H2O", [("heavy", int, 3), ("recent", int, 3)], bases=(Odd,), frozen=True)(6)
    assert type(LessCache.load(tmp_path / "cache", model).layers[0].policy) is H2O
    assert kernels.budgets_for(H2O(26, 25)) == table
    for refused in (lambda: saved(tmp_path / "other", model, policy=own), lambda: measure(model, tokens(2, 30), own)):
        with pytest.raises(LessError, match="where H2O would mean another class: give yours another name"):
            refused()
    assert not (tmp_path / "other").exists()


def test_a_policy_that_was_defined_anew_is_saved_by_what_was_made_since(tmp_path):
    """A cell of a notebook that runs twice."""
    first, second = (make_dataclass("Again", [], bases=(Odd,), frozen=True) for _ in range(2))
    with pytest.raises(LessError, match="if it was defined anew, make what uses it anew"):
        saved(tmp_path / "first", policy=first(6))
    model, _ = saved(tmp_path / "second", policy=second(6))
    assert type(LessCache.load(tmp_path / "second", model).layers[0].policy) is second


class Plain(Policy):
    """No dataclass."""

    budget = 6

    def rank(self, position, score, n):
        return position


def test_what_cannot_be_written_or_may_change_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(LessError, match=r"make its class a dataclass, @dataclass\(frozen=True\)"):
        saved(tmp_path / "plain", policy=Plain())
    with pytest.raises(LessError, match=r"may change, .*: make it @dataclass\(frozen=True\)"):
        LessCache.for_model(make_model(), dataclass(type("Loose", (Plain,), {}))())
    with pytest.raises(OSError, match="is a folder: choose another name"):
        saved("", policy=H2O(3, 3))


def test_recurrent_layers_are_refused_and_the_file_that_was_there_stays(tmp_path):
    model = tiny("qwen3_5_text")
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(ValueError, match="cannot be saved: it has LinearAttentionLayer"):
        saved(tmp_path / "cache", model)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("cache", "mine")]


def test_a_full_disk_loses_nothing_that_was_there(tmp_path):
    """In a process that may not write files of more than 4 kB."""
    _, _ = saved(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    assert len(before) > 4096
    code = (
        "import sys, torch\nfrom less_fast.files import write\n"
        "try:\n    write(sys.argv[1], {'a': torch.zeros(100_000)}, {})\n"
        "except OSError as error:\n    print('OSError', error)"
    )

    def limit():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    run = [sys.executable, "-c", code, str(tmp_path / "cache")]
    root = Path(__file__).parent.parent
    said = subprocess.run(run, capture_output=True, text=True, preexec_fn=limit, cwd=root)
    assert said.stdout.startswith("OSError"), said.stderr
    assert str(tmp_path / "cache") in said.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    assert (tmp_path / "cache").read_bytes() == before

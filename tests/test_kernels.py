"""What the kernels are: the controls and what they approximate, files, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import less_ref
from less_fast import LayerKernels, LessKernels
from less_fast.hub import CARD, CONFIG, WEIGHTS
from less_fast.layer.features import FAMILIES, Elu, Exponential, Performer, _directions

MANY = 20_000


def estimates(kernels, q, k):
    """phi(q).psi(k) of paired rows (n, D) -> (n,), by the first head."""
    return (kernels.phi(q[None, None]) * kernels.psi(k[None, None]))[0, 0].sum(-1)


@pytest.mark.parametrize("head_dim", [1, 4, 7])
def test_performer_features_approximate_the_softmax_kernel(head_dim):
    """To 5 standard errors of independent features: their relative variance is e^|q' + k'|^2 - 1, with q', k' scaled. Those
    that are orthogonal err less."""
    torch.manual_seed(head_dim)
    q, k = torch.randn(2, 50, head_dim).double() / head_dim**0.25
    estimate = estimates(Performer(1, 1, head_dim, MANY).double(), q, k)
    together = (q + k).square().sum(-1) / head_dim**0.5
    error = estimate / (q * k).sum(-1).div(head_dim**0.5).exp() - 1
    assert (error.abs() <= 5 * ((together.exp() - 1) / MANY).sqrt()).all()


def test_elu_is_x_plus_one_above_zero_and_its_exponential_below_whatever_the_rank():
    x = torch.tensor([-1e12, -1.0, 0.0, 2.0])
    kernels = Elu(2, 1, 4, rank=7)
    assert kernels.rank == 4
    assert_close(kernels.phi(x.expand(1, 2, 1, 4))[0, 1, 0], [0, 1 / np.e, 1, 3], 1e-6)  # float32
    assert_close(less_ref.Elu(4).psi(x.double().numpy(), 0), [0, 1 / np.e, 1, 3])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e12])
def test_features_of_every_size_are_finite_and_none_is_negative(family, size):
    torch.manual_seed(0)
    kernels, x = FAMILIES[family](2, 2, 4, 6, 3), size * torch.randn(1, 2, 50, 4).sign()
    for features in (kernels.phi(x), kernels.psi(x)):
        assert features.shape == (1, 2, 50, kernels.rank)
        assert features.isfinite().all()
        assert (features >= 0).all()
        assert (features > 0).all() or family not in ("exponential", "performer", "elu") or size == 1e12


def test_a_performers_exponent_is_cut_where_products_would_leave_float32():
    w = np.array([[20.0, 0, 0, 0], [8, 0, 0, 0]])  # of x' = w the exponents are |w|^2 / 2 = 200 and 32
    fast = Performer(1, 1, 4, 2)
    fast.w = torch.from_numpy(w).float()
    phi, psi = (of(fast.w[None, None] * 2**0.5)[0, 0].diagonal() for of in (fast.phi, fast.psi))
    assert_close(phi.log(), [40 - np.log(2) / 2, 32 - np.log(2) / 2], 1e-6)  # float32
    assert (phi * psi).isfinite().all()
    assert_close(np.log(np.diag(less_ref.Performer(w, 0.5).phi(w * 2**0.5, 0))), phi.log(), 1e-6)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 2**16))
def test_directions_are_orthogonal_in_blocks_of_head_dim(count, head_dim, seed):
    torch.manual_seed(seed)
    w = _directions(count, head_dim)
    assert w.shape == (count, head_dim)
    for block in w.split(head_dim):
        unit = torch.nn.functional.normalize(block, dim=-1)
        assert_close(unit @ unit.T, np.eye(len(block)), 1e-5)  # float32


LEARNED = st.sampled_from([LayerKernels, Exponential])


@pytest.mark.parametrize("family", [LayerKernels, Exponential, Performer, Elu])
def test_kernels_of_some_heads_are_of_as_many_and_drop_nothing_whatever_the_mode_of_the_whole(family):
    kernels, x = family(6, 3, 4), torch.randn(1, 4, 5, 4)
    kernels.dropout = 0.5
    part = kernels.train().select_heads([2, 0])
    assert (part.query_heads, part.kv_heads) == (4, 2)
    assert torch.equal(part.phi(x), part.phi(x))
    assert not any(weight.requires_grad for weight in part.parameters())


def test_exponential_kernels_need_no_hidden_layer():
    kernels, x = Exponential(2, 1, 3, rank=4, hidden=0), torch.randn(1, 2, 5, 3)
    assert_close(kernels.phi(x).log(), x @ kernels.q0, 1e-5)  # float32
    assert_close(kernels.psi(x[:, :1]).log(), x[:, :1] @ kernels.k0 - 10, 1e-5)


@given(LEARNED, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**16), st.data())
def test_kernels_of_some_heads_give_the_features_of_these(family, rank, kv_heads, group, seed, data):
    torch.manual_seed(seed)
    kernels = family(kv_heads * group, kv_heads, 3, rank, hidden=5).double()
    for weight in kernels.parameters():
        torch.nn.init.normal_(weight)
    q, k = torch.randn(2, kv_heads * group, 6, 3).double(), torch.randn(2, kv_heads, 6, 3).double()
    heads = data.draw(st.lists(st.integers(0, kv_heads - 1), min_size=1, unique=True))
    readers = [head * group + a for head in heads for a in range(group)]
    part = kernels.select_heads(heads)
    assert (part is kernels) == (heads == list(range(kv_heads)))
    assert (part.query_heads, part.kv_heads, part.rank) == (len(readers), len(heads), rank)
    assert_close(part.phi(q[:, readers]), kernels.phi(q)[:, readers])
    assert_close(part.psi(k[:, heads]), kernels.psi(k)[:, heads])


SIZES = dict(layers=2, query_heads=4, kv_heads=2, head_dim=4, hidden=3)
EVERY_KIND = [
    *((family, 6) for family in FAMILIES),
    *((family, [3, 2]) for family in ("paper", "exponential")),
    ("exponential", [0, 2]),
]


@pytest.mark.parametrize(("family", "rank"), EVERY_KIND)
def test_kernels_of_every_family_and_ranks_of_layers_come_back_bit_for_bit(family, rank, tmp_path):
    kernels = LessKernels(**SIZES, rank=rank, family=family, about={"epochs": 3, "error": [0.5, None]})
    kernels.save_pretrained(tmp_path)
    again = LessKernels.from_pretrained(tmp_path)
    assert (again.sizes, again.about) == (kernels.sizes, kernels.about)
    assert again.sizes == SIZES | dict(rank=rank, family=family)
    assert [layer.rank for layer in again.layers] == [layer.rank for layer in kernels.layers]
    assert list(again.state_dict()) == list(kernels.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), kernels.state_dict().values()))
    x = torch.randn(1, 4, 5, 4)
    assert all(torch.equal(a.phi(x), b.phi(x)) for a, b in zip(again.layers, kernels.layers))


@pytest.mark.parametrize("family", ["paper", "exponential", "performer"])
def test_files_that_hold_nan_are_refused_whatever_the_family(family, tmp_path):
    LessKernels(**SIZES, rank=6, family=family).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    next(iter(weights.values())).fill_(torch.nan)
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="hold NaN or infinite weights"):
        LessKernels.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(family="gauss"), "no family of kernels is called 'gauss': choose one of paper, exponential, performer, "),
        (dict(rank=0), "kernels of rank 0 in all layers are none"),
        (dict(rank=[1]), "the ranks of 1 layers do not fit 2 layers"),
        (dict(rank=[[1, 2], [3, 0]]), r"the rank of kernels must be an integer from 0 to 65,536, not \[1, 2\]"),
    ],
)
def test_families_and_ranks_that_do_not_exist_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LessKernels(**SIZES | wrong)


@given(st.integers(0, 2**16))
def test_taking_heads_apart_draws_nothing_random(seed):
    kernels = LayerKernels(2, 2, 3, 2, 4)
    torch.manual_seed(seed)
    wanted = torch.rand(3)
    torch.manual_seed(seed)
    kernels.select_heads([1])
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("rank", [2.5, None, "8", [[1.5, 2]]])
def test_a_rank_that_is_no_integer_is_refused(rank):
    with pytest.raises(ValueError, match="the rank of kernels must be an integer from 0 to"):
        LessKernels(1, 2, 2, 4, rank=rank, hidden=3)


def test_a_rank_may_be_any_kind_of_integer_and_list():
    ranks = [LessKernels(2, 2, 2, 4, rank=rank, hidden=3).sizes["rank"] for rank in (np.int64(3), (np.int64(1), 2))]
    assert ranks == [3, [1, 2]]


def test_kernels_go_to_the_hub_as_a_whole_folder_with_a_card(monkeypatch):
    import huggingface_hub

    said, stored = [], {}

    class Hub:
        def create_repo(self, name, private, exist_ok):
            said.append((name, private, exist_ok))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            said.append(repo_id)
            stored.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    kernels = LessKernels(2, 4, 2, 8, hidden=3, about={"model": "some/model"})
    assert kernels.push_to_hub("me/kernels", private=True) == "https://huggingface.co/me/kernels"
    assert said == [("me/kernels", True, True), "me/kernels"]
    assert set(stored) == {WEIGHTS, CONFIG, CARD}
    card = stored[CARD].decode()
    assert card.startswith("---\nlibrary_name: less-kv\n")
    assert "# LESS kernels for some/model" in card
    assert "4 query heads and 2 KV heads of 8, 8 features" in card


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, CARD])
def test_kernels_are_not_saved_over_folders_or_a_readme_of_something_else(name, tmp_path):
    if name == CARD:
        (tmp_path / name).write_text("# My project")
    else:
        (tmp_path / name).mkdir()
    before = [*tmp_path.iterdir()]
    with pytest.raises(OSError, match=r"is a folder|is no model card of kernels"):
        LessKernels(1, 2, 2, 4, hidden=3).save_pretrained(tmp_path)
    assert [*tmp_path.iterdir()] == before


def test_a_disk_that_is_full_loses_no_kernels_that_were_there(tmp_path, monkeypatch):
    LessKernels(1, 2, 2, 4, hidden=3).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_):
        raise OSError("no space left on device")

    for name in ("write_tensors", "card"):
        with monkeypatch.context() as patch:
            patch.setattr(f"less_fast.kernels.{name}", full)
            with pytest.raises(OSError, match="no space left"):
                LessKernels(1, 2, 2, 4, hidden=3).save_pretrained(tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

"""The kernels phi and psi, for one layer and for a whole model, and their files: the paper's learned ones (section 3), and
three untrained families that it, or the field, compares with."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import elu, gelu

from .allocate import Curves, Table, table

WEIGHTS, CONFIG, CARD = "kernels.safetensors", "config.json", "README.md"
CARD_BEGINS = "---\nlibrary_name: less-kv\n"
MOST = 2**16  # layers, heads, features, numbers in a head: more is a mistake, or a broken file


class Features(nn.Module):
    """What every family of kernels says: phi and psi of one layer, and the rank of each of its KV heads.

    ranks: how many features each KV head has. Where they differ, the features of the others are padded with exact zeros up to
    `rank`, the largest, until `of_heads` takes heads of equal rank apart.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int | Sequence[int]):
        super().__init__()
        self.query_heads, self.kv_heads = _integer("query_heads", query_heads), _integer("kv_heads", kv_heads)
        self.head_dim = _integer("head_dim", head_dim)
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"kernels need sizes of at least 1 and query heads that are a multiple of the KV heads, "
                f"not {query_heads=}, {kv_heads=}, {head_dim=}"
            )
        ranks = rank if isinstance(rank, list | tuple) else [rank] * self.kv_heads
        if len(ranks) != self.kv_heads:
            raise ValueError(f"kernels need one rank, or one for each of {kv_heads} KV heads, not {rank}")
        self.ranks = [_integer("a rank", some) for some in ranks]

    @property
    def rank(self) -> int:
        return max(self.ranks)

    def phi(self, q: torch.Tensor) -> torch.Tensor:
        """q (N, Hq, m, D), rotated and not scaled -> (N, Hq, m, R), in float32 or wider."""
        raise NotImplementedError

    def psi(self, k: torch.Tensor) -> torch.Tensor:
        """k (N, Hkv, m, D), rotated -> (N, Hkv, m, R), in float32 or wider."""
        raise NotImplementedError

    def of_heads(self, kv_heads: list[int]) -> "Features":
        """The kernels of some KV heads, and of the query heads that read them."""
        raise NotImplementedError


class Learned(Features):
    """Kernels with weights: those whose names begin with q are of the query heads, those with k of the KV heads."""

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int | Sequence[int], hidden: int, least: int):
        super().__init__(query_heads, kv_heads, head_dim, rank)
        self.hidden = _integer("a hidden width", hidden, least)
        self.dropout = 0.0  # on the hidden layer, in train mode

    @property
    def _group(self):
        return self.query_heads // self.kv_heads

    def _hidden_layer(self, x, weight):
        """x (H, N m, D) -> (H, N m, h): one matrix product for each head, weights never expanded."""
        hidden = gelu(x @ weight)
        if self.training and self.dropout > 0:
            hidden = hidden * _dropout_mask(hidden, self.dropout)
        return hidden

    def of_heads(self, kv_heads):
        """Itself for all heads where their ranks are equal, else a copy of their weights."""
        ranks = [self.ranks[head] for head in kv_heads]
        if kv_heads == list(range(self.kv_heads)) and min(ranks) == self.rank:
            return self
        query_heads = [head * self._group + a for head in kv_heads for a in range(self._group)]
        with torch.device("meta"):  # where nothing random is drawn
            part = type(self)(len(query_heads), len(kv_heads), self.head_dim, ranks, self.hidden)
        part = part.to_empty(device=self.q1.device).to(self.q1.dtype)
        with torch.no_grad():
            for name, weight in part.named_parameters():
                theirs = getattr(self, name)[query_heads if name.startswith("q") else kv_heads]
                weight.copy_(theirs[tuple(slice(size) for size in weight.shape)])
        return part


class LayerKernels(Learned):
    """The paper's: two-layer networks with weights per query head (phi) and per KV head (psi), non-negative.

        phi(q) = | gelu(gelu(q Q1) Q2) |        psi(k) = | gelu(gelu(k K1) K2) K3 |        exact GELU

    K3 starts at 1e-4 times the identity, so that training starts from the bare policy.
    """

    def __init__(
        self, query_heads: int, kv_heads: int, head_dim: int, rank: int | Sequence[int] = 8, hidden: int = 512
    ):
        super().__init__(query_heads, kv_heads, head_dim, rank, hidden, least=1)
        R = self.rank
        self.q1 = nn.Parameter(torch.randn(query_heads, head_dim, hidden) * head_dim**-0.5)  # (Hq, D, h)
        self.q2 = nn.Parameter(torch.randn(query_heads, hidden, R) * hidden**-0.5)  # (Hq, h, R)
        self.k1 = nn.Parameter(torch.randn(kv_heads, head_dim, hidden) * head_dim**-0.5)  # (Hkv, D, h)
        self.k2 = nn.Parameter(torch.randn(kv_heads, hidden, R) * hidden**-0.5)  # (Hkv, h, R)
        self.k3 = nn.Parameter(torch.eye(R).repeat(kv_heads, 1, 1) * 1e-4)  # (Hkv, R, R)
        with torch.no_grad():  # a feature that starts at zero stays there, because its gradient is zero too
            for head, rank in enumerate(self.ranks):
                self.q2[head * self._group : (head + 1) * self._group, :, rank:] = 0
                self.k2[head, :, rank:] = 0

    def phi(self, q):
        return _of_rows(self._two_layers(_of_heads(q), self.q1, self.q2).abs(), q)

    def psi(self, k):
        return _of_rows((self._two_layers(_of_heads(k), self.k1, self.k2) @ self.k3).abs(), k)

    def _two_layers(self, x, first, second):
        """x (H, N m, D) -> (H, N m, R)."""
        return gelu(self._hidden_layer(x.to(first.dtype), first) @ second)


class Exponential(Learned):
    """A departure from the paper, learned and positive by an exponential instead of an absolute value:

        phi(q) = exp(q Q0 + gelu(q Q1) Q2)        psi(k) = exp(k K0 + gelu(k K1) K2 + b)        exact GELU

    A softmax weight is an exponential of something linear in q and in k, which a rank of 8 then has to sum up; so a narrow
    hidden layer does, or none. Exponents are cut at 40, so that products stay within float32. b starts at -10, so that training
    starts from the bare policy.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int | Sequence[int] = 8, hidden: int = 32):
        super().__init__(query_heads, kv_heads, head_dim, rank, hidden, least=0)
        R = self.rank
        self.q0 = nn.Parameter(torch.randn(query_heads, head_dim, R) * head_dim**-0.5)  # (Hq, D, R)
        self.q1 = nn.Parameter(torch.randn(query_heads, head_dim, hidden) * head_dim**-0.5)  # (Hq, D, h)
        self.q2 = nn.Parameter(torch.zeros(query_heads, hidden, R))  # (Hq, h, R)
        self.k0 = nn.Parameter(torch.randn(kv_heads, head_dim, R) * head_dim**-0.5)  # (Hkv, D, R)
        self.k1 = nn.Parameter(torch.randn(kv_heads, head_dim, hidden) * head_dim**-0.5)  # (Hkv, D, h)
        self.k2 = nn.Parameter(torch.zeros(kv_heads, hidden, R))  # (Hkv, h, R)
        self.k3 = nn.Parameter(torch.full((kv_heads, R), -10.0))  # (Hkv, R), b

    def phi(self, q):
        return self._padded(_of_rows(self._exponential(_of_heads(q), self.q0, self.q1, self.q2), q))

    def psi(self, k):
        return self._padded(_of_rows(self._exponential(_of_heads(k), self.k0, self.k1, self.k2, self.k3), k))

    def _exponential(self, x, linear, first, second, bias=None):
        """x (H, N m, D) -> (H, N m, R)."""
        x = x.to(linear.dtype)
        exponent = x @ linear + self._hidden_layer(x, first) @ second
        if bias is not None:
            exponent = exponent + bias[:, None]
        return exponent.clamp(max=40).exp()

    def _padded(self, features):
        """features (N, H, m, R), with zeros beyond the rank of each head."""
        if min(self.ranks) == self.rank:
            return features
        ranks = torch.tensor(self.ranks, device=features.device).repeat_interleave(features.shape[1] // self.kv_heads)  # (H,)
        return features * (torch.arange(self.rank, device=features.device) < ranks[:, None])[:, None]


class Control(Features):
    """Kernels without training, the same function for queries and keys and for all heads. To compare with."""

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int, hidden: int | None = None):
        if isinstance(rank, list | tuple):
            raise ValueError(f"{type(self).__name__} has one rank for all heads, not {rank}")
        super().__init__(query_heads, kv_heads, head_dim, rank)

    def psi(self, k):
        return self.phi(k)

    def of_heads(self, kv_heads):
        return self


class Performer(Control):
    """Positive random features of the softmax (Choromanski et al. 2020): phi(q).psi(k) is e^(scale q.k) in expectation.

        phi(x) = exp(w.x' - |x'|^2 / 2) / sqrt(R),  x' = sqrt(scale) x,  scale = 1 / sqrt(head_dim)

    with R directions w, orthogonal in blocks of head_dim and as long as normal vectors. The exponent, at most |w|^2 / 2, is
    cut at 40, so that products stay within float32.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int = 8, hidden: int | None = None):
        super().__init__(query_heads, kv_heads, head_dim, rank)
        self.register_buffer("w", _directions(self.rank, self.head_dim))  # (R, D)

    def phi(self, q):
        x = q.to(self.w.dtype) * self.head_dim**-0.25
        exponent = x @ self.w.T - x.square().sum(-1, keepdim=True) / 2
        return exponent.clamp(max=40).exp() * self.rank**-0.5


class Fourier(Control):
    """Random Fourier features (Peng et al. 2021): of q and k of unit length, phi(q).psi(k) is e^(q.k) in expectation.

        phi(x) = sqrt(2 e / R) [cos(w.x / |x|), sin(w.x / |x|)]    with R / 2 directions w

    The features are signed, so phi.z may turn out negative: such a query does without its low-rank part.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int = 8, hidden: int | None = None):
        super().__init__(query_heads, kv_heads, head_dim, rank)
        if self.rank % 2:
            raise ValueError(f"random Fourier features come in pairs: the rank must be even, not {rank}")
        self.register_buffer("w", _directions(self.rank // 2, self.head_dim))  # (R / 2, D)

    def phi(self, q):
        x = q.to(self.w.dtype)
        angle = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30) @ self.w.T
        return torch.cat([angle.cos(), angle.sin()], -1) * math.sqrt(2 * math.e / self.rank)


class Elu(Control):
    """phi(x) = psi(x) = elu(x) + 1 (Katharopoulos et al. 2020): as many features as head_dim, whatever rank is asked for."""

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int | None = None, hidden: int | None = None):
        super().__init__(query_heads, kv_heads, head_dim, head_dim)

    def phi(self, q):
        x = q.to(torch.promote_types(q.dtype, torch.float32))
        return elu(x) + 1


FAMILIES = {"paper": LayerKernels, "exponential": Exponential, "performer": Performer, "fourier": Fourier, "elu": Elu}
"""Every family by the name that files and the command line use."""


def _directions(count, head_dim):
    """(count, head_dim): random directions, orthogonal in blocks of head_dim, as long as normal vectors are."""
    q, r = torch.linalg.qr(torch.randn(-(-count // head_dim), head_dim, head_dim))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # or some directions would come more often than others
    return q.flatten(0, 1)[:count] * torch.randn(count, head_dim).norm(dim=1, keepdim=True)


def _of_heads(x):
    """(N, H, m, D) -> (H, N m, D): what a head has to multiply."""
    return x.transpose(0, 1).flatten(1, 2)


def _of_rows(features, x):
    """features (H, N m, R) of x (N, H, m, D) -> (N, H, m, R)."""
    return features.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


def _dropout_mask(x, rate):
    """0 or 1 / (1 - rate) in the shape of x. One random byte decides each element (so the rate is a multiple of 1/256): on
    a CPU, drawing a random float for each takes a third of the whole training step."""
    dropped = round(rate * 256)
    longs = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),), device=x.device)
    keep = longs.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return keep.to(x.dtype).mul_(256 / (256 - dropped))


class LessKernels(nn.Module):
    """The kernels of all attention layers of a model: `kernels.layers[i]` belong to layer i.

    rank: features of each KV head, or a table (layers x KV heads) of them; family: a name in FAMILIES; about: what is known of
    them (the model's fingerprint, how they were trained); curves: what each KV head costs at each budget, by the name of the
    policy. Both are stored in config.json beside the weights.
    """

    def __init__(
        self,
        layers: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        rank: int | Sequence[Sequence[int]] = 8,
        hidden: int = 512,
        about: dict | None = None,
        family: str = "paper",
        curves: dict[str, Curves] | None = None,
    ):
        super().__init__()
        sizes = dict(layers=layers, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
        self.sizes = {name: _integer(name, size) for name, size in sizes.items()}
        self.sizes |= dict(rank=_integers(rank), hidden=_integer("a hidden width", hidden, least=0), family=family)
        self.about, self.curves = {} if about is None else about, {} if curves is None else curves
        if not isinstance(self.about, dict) or not isinstance(self.curves, dict):
            raise ValueError(f"about and curves are dicts, not {about!r} and {curves!r}")
        marks = self.about.get("fingerprint") or [0.0] * layers
        if not isinstance(marks, list) or len(marks) != layers or not all(type(mark) in (int, float) for mark in marks):
            raise ValueError(f"a fingerprint is one number for each of {layers} layers, not {marks!r}")
        for name, some in self.curves.items():
            if not isinstance(some, Curves):
                raise ValueError(f"the curves of {name} are no Curves, but {some!r}")
            for kind in (some.bare, some.less or some.bare):
                if [len(layer) for layer in kind] != [kv_heads] * layers:
                    raise ValueError(f"the curves of {name} do not fit {layers} layers of {kv_heads} KV heads")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(f"no family of kernels is called {family!r}: choose one of {', '.join(FAMILIES)}")
        table = self.sizes["rank"] if isinstance(rank, list | tuple) else [rank] * layers
        if len(table) != layers:
            raise ValueError(f"the ranks of {len(table)} layers do not fit {layers} layers")
        self.layers = nn.ModuleList(FAMILIES[family](query_heads, kv_heads, head_dim, some, hidden) for some in table)

    def budgets_for(self, policy, less: bool = True) -> Table | None:
        """The budget table (layers x KV heads) that gives the KV heads policy.budget tokens on average where they do most.

        less: for LESS with these kernels, or for the bare policy. None where no curves are known for this kind of policy, or
        they do not reach the budget.
        """
        curves = self.curves.get(type(policy).__name__)
        if curves is None or policy.budget is None:
            return None
        return table(curves, policy.budget * self.sizes["layers"] * self.sizes["kv_heads"], less)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes kernels.safetensors, config.json and a model card, README.md, into `folder`: all aside first, then renamed.

        Raises OSError, and leaves the folder as it was, where they cannot be written.
        """
        folder = make_folder(folder)
        aside = {name: folder / f".{name}.new" for name in (WEIGHTS, CONFIG, CARD)}
        stored = {**self.sizes, "about": self.about, "curves": {name: asdict(some) for name, some in self.curves.items()}}
        try:
            save_file({name: weight.contiguous() for name, weight in self.state_dict().items()}, aside[WEIGHTS])
            aside[WEIGHTS].chmod(0o644)  # it is written for its owner alone
            aside[CONFIG].write_text(json.dumps(stored, indent=2) + "\n")
            aside[CARD].write_text(_card(self))
            for name, file in aside.items():
                file.rename(folder / name)
        finally:
            for file in aside.values():
                file.unlink(missing_ok=True)

    def push_to_hub(self, repository: str, private: bool = False) -> str:
        """Uploads the kernels, their config and the model card to a repository of the hub; returns its address."""
        from huggingface_hub import HfApi

        hub = HfApi()
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            address = hub.create_repo(repository, private=private, exist_ok=True)
            hub.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="LESS kernels")
        return str(address)

    @classmethod
    def from_pretrained(cls, where: str | os.PathLike) -> "LessKernels":
        """Reads kernels from a local folder, or from a repository of the Hugging Face hub.

        Raises FileNotFoundError where there are none, ValueError where the files do not fit together or hold NaN.
        """
        weights, config = _locate(where)
        try:
            stored = json.loads(config.read_text())
            curves = {name: Curves(**some) for name, some in stored.pop("curves", {}).items()}
            with torch.device("meta"):  # sizes that are not those of the weights shall take no memory
                kernels = cls(**stored, curves=curves)
            kernels.load_state_dict(_fitting(load_file(weights), kernels.state_dict()), assign=True)
            _card(kernels)  # what is said about them is enough to save them again
        except (RuntimeError, TypeError, AttributeError, ValueError, LookupError, ArithmeticError, SafetensorError) as error:
            raise ValueError(f"the kernels in {where} are broken, or do not fit their {CONFIG}: {error}") from error
        broken = [name for name, weight in kernels.state_dict().items() if not weight.isfinite().all()]
        if broken:
            raise ValueError(f"the kernels in {where} hold NaN or infinite weights ({broken[0]}): train or copy them again")
        return kernels.requires_grad_(False).eval()

    @classmethod
    def from_official(cls, folder: str | os.PathLike) -> "LessKernels":
        """Reads the layer_*.pth files that the authors' train_kernels.py writes, for Llama or for Falcon.

        They hold psi's third matrix in factors: K3 = diag|scalingD| (I + interaction_k diag(scalingD2)). Falcon's key kernels
        are linear layers, their weights transposed, one for all heads. The files are unpickled with weights_only=True.
        Raises FileNotFoundError where there are none, ValueError where they do not fit each other.
        """
        files = {int(file.stem[6:]): file for file in Path(folder).glob("layer_*.pth") if file.stem[6:].isdecimal()}
        if not files:
            raise FileNotFoundError(f"the folder {folder} holds no layer_*.pth files")
        if sorted(files) != list(range(len(files))):
            raise ValueError(f"the folder {folder} holds {len(files)} layers, but not layers 0 to {len(files) - 1}")
        layers, settings = [], {}
        for index in range(len(files)):
            try:
                loaded = torch.load(files[index], map_location="cpu", weights_only=True)
                layers.append(_official_weights(loaded["model_state_dict"]))
                settings = dict(loaded.get("config", {}))
            except Exception as error:  # a broken pickle raises anything
                why = " ".join(f"{type(error).__name__} {error}".split())
                raise ValueError(f"{files[index]} is no layer of the authors' kernels: {why}") from error
            if wrong := [name for name, weight in layers[-1].items() if weight.ndim != 3]:
                raise ValueError(f"{files[index]} is no layer of the authors' kernels: {wrong[0]} has no heads")
        (query_heads, head_dim, hidden), (kv_heads, _, rank) = layers[0]["q1"].shape, layers[0]["k2"].shape
        about = {"origin": "the authors' checkpoint", "settings": {name: str(value) for name, value in settings.items()}}
        kernels = cls(len(layers), query_heads, kv_heads, head_dim, rank, hidden, about)
        try:
            for layer, weights in zip(kernels.layers, layers):
                layer.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"the layers in {folder} differ in shape: {error}") from error
        return kernels.requires_grad_(False).eval()


def make_folder(folder: str | os.PathLike) -> Path:
    """The folder, there now, for kernels. OSError where there can be none, or files of other things would be replaced."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if taken := [name for name in (WEIGHTS, CONFIG, CARD) if (folder / name).is_dir()]:
        raise IsADirectoryError(f"{folder / taken[0]} is a folder, and kernels have a file of that name")
    if (card := folder / CARD).exists() and not card.read_bytes().startswith(CARD_BEGINS.encode()):
        raise FileExistsError(f"{card} is no model card of kernels, and would be replaced by one: choose another folder")
    return folder


def _fitting(loaded: dict, wanted: dict) -> dict[str, torch.Tensor]:
    """The weights loaded, in float32. ValueError where they are not those wanted, by name and shape, or no floats."""
    for name in sorted(loaded.keys() | wanted.keys()):
        found, shape = (tuple(some[name].shape) if name in some else None for some in (loaded, wanted))
        if found != shape:
            raise ValueError(f"{name} has the shape {found}, and by its config {shape}")
        if not loaded[name].is_floating_point():
            raise ValueError(f"{name} holds {loaded[name].dtype}, not floats")
    return {name: weight.float() for name, weight in loaded.items()}


def _official_weights(state: dict) -> dict[str, torch.Tensor]:
    """The five matrices of one layer, (heads, in, out) each, from the authors' names."""
    k1, k2, mixed = (
        state[f"{name}.weight"].float().T[None] if f"{name}.weight" in state else state[name].float()
        for name in ("kernel_k_mat1", "kernel_k_mat2", "interaction_k")
    )
    first, second = (state[name].float()[0, :, 0] for name in ("scalingD", "scalingD2"))  # (Hkv, R)
    k3 = torch.diag_embed(first.abs()) @ (torch.eye(first.shape[-1]) + mixed @ torch.diag_embed(second))
    return {"q1": state["kernel_q_mat1"].float(), "q2": state["kernel_q_mat2"].float(), "k1": k1, "k2": k2, "k3": k3}


def _card(kernels: LessKernels) -> str:
    """A model card, as the hub shows it: what these kernels are for, how they came about, how to use them."""
    about, sizes = kernels.about, kernels.sizes
    features = sum(sum(layer.ranks) for layer in kernels.layers) / (sizes["layers"] * sizes["kv_heads"])
    lines = [
        CARD_BEGINS + "tags: [less, kv-cache, long-context]\n---\n",
        f"# LESS kernels for {about.get('model', 'a model of the shape below')}",
        "",
        f"Kernels of the {sizes['family']} family for {sizes['layers']} layers, {sizes['query_heads']} query heads and "
        f"{sizes['kv_heads']} KV heads of {sizes['head_dim']}, {features:g} features for each KV head on average. With them, "
        f"text is generated in constant memory: what the policy evicts is folded into a small state (LESS, arXiv 2402.09398).",
        "",
        "```python",
        "from less_fast import H2O, LessCache, LessKernels",
        "",
        "cache = LessCache.for_model(model, policy=H2O(heavy=26, recent=25), kernels=LessKernels.from_pretrained(WHERE))",
        "model.generate(**inputs, past_key_values=cache)",
        "```",
        "",
    ]
    if "policy" in about:
        lines.append(f"Trained for {about['policy']} on {about['sequences']} windows of {about['window']} tokens.")
    if "validation" in about:
        shares = ", ".join(f"{found['less'] / found['bare']:.2f}" for found in about["validation"])
        lines.append(f"Of the bare policy's error each layer alone leaves {shares}.")
    for stage, how in (("joint", "under uniform budgets"), ("tables", "under budget tables")):
        if found := about.get(stage):
            figures = (f"{b}: {x:.3f} to {y:.3f}" for b, x, y in zip(found["budgets"], found["before"], found["after"]))
            lines.append(f"All layers together {how}: divergence from the full cache, by budget, {'; '.join(figures)} nats.")
    if kernels.curves:
        lines.append(f"Budget tables are derived from curves for {', '.join(kernels.curves)} in {CONFIG}.")
    return "\n".join([*lines, f"All settings and figures: {CONFIG}.", ""])


def _integer(what: str, value, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= MOST:
        raise ValueError(f"kernels need {what} of at least {least} and at most {MOST:,}, not {value!r}")
    return int(value)


def _integers(rank):
    """A rank, or a table of them, in int and list."""
    return [_integers(row) for row in rank] if isinstance(rank, list | tuple) else _integer("a rank", rank)


def _locate(where) -> tuple[Path, Path]:
    folder = Path(where)
    if folder.is_dir():
        missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"the folder {where} holds no kernels: {missing[0]} is missing")
        return folder / WEIGHTS, folder / CONFIG
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(where), WEIGHTS)), Path(hf_hub_download(str(where), CONFIG))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"no kernels at {where}: neither a folder nor a repository of the hub") from error

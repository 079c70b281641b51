"""Numbers and checkpoints of the authors' public code (official_vectors/README.md)."""

from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "official_vectors"


def read(name):
    with np.load(FOLDER / name) as file:
        return dict(file)


def kernels_of(file, factors=None):
    """The authors' weights as our five matrices, float64; `factors`: tensors to take instead of the file's arrays."""
    w = factors or {name[2:]: torch.from_numpy(array).double() for name, array in file.items() if name.startswith("w_")}
    k1, k2, ik = (w[name] if w[name].ndim == 3 else w[name].T[None] for name in ("k1", "k2", "ik"))  # (Hkv, in, out)
    first, second = w["sD"][0, :, 0], w["sD2"][0, :, 0]  # (Hkv, R)
    k3 = torch.diag_embed(first.abs()) @ (torch.eye(ik.shape[-1]) + ik @ torch.diag_embed(second))
    return dict(q1=w["q1"], q2=w["q2"], k1=k1, k2=k2, k3=k3)


def save_as_the_authors(file, folder, layers=1):
    """Their checkpoint of these weights: layer_*.pth, in which Falcon's key kernels are linear layers."""
    names = {"q1": "kernel_q_mat1", "q2": "kernel_q_mat2", "k1": "kernel_k_mat1", "k2": "kernel_k_mat2", "ik": "interaction_k"}
    names |= {"sD": "scalingD", "sD2": "scalingD2"}
    weights = {name: torch.from_numpy(file[f"w_{name}"]) for name in names}
    state = {names[name] + ".weight" * (name in ("k1", "k2", "ik") and w.ndim == 2): w for name, w in weights.items()}
    for index in range(layers):
        state["scalingD"] = weights["sD"] * (1 if index == layers - 1 else 2)  # the last is that of the file
        more = {"train_mses": torch.zeros(3), "val_mses": torch.ones(3), "config": {"lr": 0.001, "model_name": "llama2"}}
        torch.save({"model_state_dict": state} | more, folder / f"layer_{index}.pth")

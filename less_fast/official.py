"""Checkpoints of the authors' code (hdong920/LESS): the layer_*.pth files that its train_kernels.py writes."""

import os
from pathlib import Path

import torch

from .layer.checks import LessError


def read_official(folder: str | os.PathLike) -> tuple[list[dict[str, torch.Tensor]], dict[str, str]]:
    """The weights of each layer under our names, for Llama or for Falcon, and the settings that they were trained with.

    The files hold psi's third matrix in factors: K3 = diag|scalingD| (I + interaction_k diag(scalingD2)). Falcon's key kernels
    are linear layers, their weights transposed, one for all heads. The files are unpickled with weights_only=True.
    Raises FileNotFoundError if there are none, LessError if one is broken or missing.
    """
    files = {int(file.stem[6:]): file for file in Path(folder).glob("layer_*.pth") if file.stem[6:].isdecimal()}
    if not files:
        raise FileNotFoundError(f"the folder {folder} holds no layer_*.pth files")
    if sorted(files) != list(range(len(files))):
        raise LessError(f"the folder {folder} holds {len(files)} layers, but not layers 0 to {len(files) - 1}")
    layers, settings = [], {}
    for index in range(len(files)):
        try:
            stored = torch.load(files[index], map_location="cpu", weights_only=True)
            layers.append(_weights(stored["model_state_dict"]))
            settings = {name: str(value) for name, value in dict(stored.get("config", {})).items()}
        except Exception as error:  # a broken pickle raises anything
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise LessError(f"{files[index]} is no layer of the authors' kernels: {reason}") from error
        if wrong := [name for name, weight in layers[-1].items() if weight.ndim != 3]:
            raise LessError(f"{files[index]} is no layer of the authors' kernels: {wrong[0]} has no heads")
    return layers, settings


def _weights(state: dict) -> dict[str, torch.Tensor]:
    """The five matrices of one layer, (heads, in, out) each, from the authors' names."""
    k1, k2, mixed = (
        state[f"{name}.weight"].float().T[None] if f"{name}.weight" in state else state[name].float()
        for name in ("kernel_k_mat1", "kernel_k_mat2", "interaction_k")
    )
    first, second = (state[name].float()[0, :, 0] for name in ("scalingD", "scalingD2"))  # (Hkv, R)
    k3 = torch.diag_embed(first.abs()) @ (
        torch.eye(first.shape[-1], dtype=torch.float32, device="cpu") + mixed @ torch.diag_embed(second)
    )
    return {"q1": state["kernel_q_mat1"].float(), "q2": state["kernel_q_mat2"].float(), "k1": k1, "k2": k2, "k3": k3}

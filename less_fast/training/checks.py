"""What training and measuring refuse before anything is computed or written."""

import torch
from transformers import PreTrainedModel

from ..hf.architecture import sizes
from ..layer.checks import LessError
from ..layer.policies import Policy
from ..layer.state import need_policy
from ..setting import Setting


def check_windows(model: PreTrainedModel, windows: torch.Tensor, what: str = "windows") -> None:
    """LessError unless they are tokens of the model's vocabulary: (W, T) int64, at least one."""
    if not isinstance(windows, torch.Tensor) or windows.dtype != torch.int64 or windows.ndim != 2:
        kind = f"{windows.dtype} {tuple(windows.shape)}" if isinstance(windows, torch.Tensor) else type(windows).__name__
        raise LessError(f"{what} must be an int64 tensor (windows, tokens), not {kind}: `less_fast.text.windows` makes them")
    if windows.numel() == 0:
        raise LessError(f"{what} hold no tokens, {tuple(windows.shape)}: give at least one window of them")
    least, most, vocabulary = (
        windows.min().item(),
        windows.max().item(),
        len(model.get_input_embeddings().get_parameter("weight")),
    )
    if least < 0 or most >= vocabulary:
        raise LessError(
            f"{what} hold tokens from {least} to {most}, and {type(model).__name__} knows 0 to {vocabulary - 1}: make them with "
            f"the model's own tokenizer"
        )


def check_streamed(policy: Policy) -> None:
    """LessError unless the policy evicts one token at a time, which the parallel form needs, and asks for no kinds of tokens."""
    need_policy(policy)
    if not policy.one_leaves:
        raise LessError(f"training needs a policy that evicts one token at a time, and {policy} does not: H2O does, for example")
    if policy.needs == "kinds":
        raise LessError(f"{policy} asks for the kinds of tokens, and training knows none: take another policy, H2O for example")


def check_setting(model: PreTrainedModel, setting: Setting) -> None:
    """LessError unless the setting is for a model of these sizes, and the model can be measured under it, token by token."""
    shape, kernels = sizes(model), setting.kernels
    if setting.sizes not in (None, shape) or not (kernels is None or shape.items() <= kernels.sizes.items()):
        raise LessError(
            f"this setting is for a model of other sizes than {type(model).__name__}: make it with `Setting.of` for it"
        )
    if setting.chunk not in (None, 1):
        raise LessError(
            f"costs are those of streaming token by token, and this setting has chunks of {setting.chunk}: leave them out"
        )
    check_streamed(setting.policy)
    if model.training:
        raise LessError("the model is in training mode, in which its predictions are not its own: call `model.eval()` first")
    wanted = torch.promote_types(model.dtype, torch.float32), model.device
    for weight in () if kernels is None else kernels.state_dict().values():
        if (weight.dtype, weight.device) != wanted:
            raise LessError(
                "these kernels must be {0} on {1} for this model: call `kernels.to({0}, device={1!r})`".format(*wanted)
            )


def number(what: str, value: object, least: float, most: float) -> float:
    """The value as a float. LessError if it is no number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise LessError(f"{what} must be a number from {least:g} to {most:g}, not {value!r}")
    return float(value)

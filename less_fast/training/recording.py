"""A model's attention on disk: what the training of one layer after the other needs, computed in one pass and once.

A recording is a folder with a file for each layer and for each shard of a few windows; a file that is there is complete.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..files import aside, write_tensors
from ..hf.architecture import sizes
from ..hf.seam import read
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.features import Features
from ..layer.parallel import dense, eviction_times, exact_part
from ..layer.policies import Policy

SHARD = 8  # windows in a file


@dataclass
class Recorded:
    """What a layer is trained on, for N sequences and the L = T - 1 - budget queries behind the first eviction."""

    q: torch.Tensor  # (N, Hq, T, D)
    k: torch.Tensor  # (N, Hkv, T, D)
    v: torch.Tensor  # (N, Hkv, T, D)
    e: torch.Tensor  # (N, Hkv, T) eviction times
    exact: torch.Tensor  # (N, Hq, L, D) attention over what is kept
    lse: torch.Tensor  # (N, Hq, L) its log-sum-exp
    full: torch.Tensor  # (N, Hq, L, D) attention over everything: the target


@torch.no_grad()
def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, policy: Policy, scale: float | None, kernels: Features | None = None
) -> Recorded:
    """What does not depend on phi and psi. q (N, Hq, T, D), k, v (N, Hkv, T, D) of any float dtype; the rest is float32."""
    q, k, v = (x.float() for x in (q, k, v))
    e = eviction_times(q, k, v, policy, scale, kernels=kernels)
    exact, lse = exact_part(q, k, v, e, scale)
    late = slice(policy.budget + 1, None)
    return Recorded(q, k, v, e, exact[:, :, late], lse[:, :, late], dense(q, k, v, scale)[:, :, late])


def bytes_on_disk(model: PreTrainedModel, windows: torch.Tensor, policy: Policy, layers: int) -> int:
    """What the recording of so many layers will take, but for a few kilobytes of headers."""
    shape, (N, T) = sizes(model), windows.shape
    late, D, Hq, Hkv = T - 1 - policy.budget, shape["head_dim"], shape["query_heads"], shape["kv_heads"]
    numbers = (Hq + 2 * Hkv) * T * D + Hq * late * (2 * D + 1)  # in float32
    return layers * N * (4 * numbers + 8 * Hkv * T)


class Recording:
    """The recorded layers of `windows` (N, T) under `policy`, in `folder`."""

    def __init__(self, folder: Path, windows: torch.Tensor, policy: Policy):
        self.folder, self.windows, self.policy = folder, windows, policy

    def file(self, layer: int, shard: int) -> Path:
        return self.folder / f"layer-{layer:03}-shard-{shard:05}.safetensors"

    @torch.no_grad()
    def record(
        self,
        model: PreTrainedModel,
        kernels: LessKernels,
        layers: Sequence[int],
        shards: slice = slice(None),
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs the model over the windows of these shards and writes what is missing of the layers.

        Raises LessError where a layer's attention is not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = list(enumerate(self.windows.split(SHARD)))[shards]
        for shard, ids in parts:
            missing = [layer for layer in layers if not self.file(layer, shard).exists()]
            if missing:
                read(model, ids, self._recorder(missing, shard, kernels))
            progress()

    def _recorder(self, layers, shard, kernels):
        def attention(layer, q, k, v, scale):
            if layer in layers:
                data = prepare(q, k, v, self.policy, scale, kernels.layers[layer])
                if not (data.exact.isfinite().all() and data.full.isfinite().all()):
                    raise LessError(f"the attention of layer {layer} is not finite: the model's weights or the text are broken")
                with aside(self.file(layer, shard)) as file:
                    write_tensors(file, vars(data))
            return dense(q, k, v, scale)

        return attention

    def rows(self, layer: int, index: Sequence[int], device: torch.device | str = "cpu") -> Recorded:
        """Some of the windows, read from disk. LessError if a file is broken."""
        parts = []
        for row in index:
            one, shard = slice(row % SHARD, row % SHARD + 1), self.file(layer, row // SHARD)
            try:
                with torch.device("cpu"), safe_open(shard, "pt") as file:
                    parts.append([file.get_slice(name)[one] for name in Recorded.__dataclass_fields__])
            except SafetensorError as error:
                raise LessError(f"{shard} is broken: delete it, and it is recorded again ({error})") from error
        return Recorded(*(torch.cat(part).to(device) for part in zip(*parts)))

    def forget(self, layer: int) -> None:
        """Deletes the files of a layer, with those that a kill left half written."""
        for file in self.folder.glob(f"*layer-{layer:03}-shard-*.safetensors"):
            file.unlink(missing_ok=True)

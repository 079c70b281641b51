"""Tokens one at a time: `extend` for each of them, or the same compiled. On a GPU the step is captured once as a CUDA graph and
replayed, because launching its many small kernels one by one takes longer than running them."""

from collections.abc import Callable, Sequence

import torch

from .attend import Logits
from .state import LayerState
from .step import compiled, extend

WARM_UP = 3  # steps before a graph is captured, as torch asks for
FEW = 16  # steps for which no graph is captured


def stream(
    state: LayerState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None = None,
    logits: Logits = Logits(),
    kinds: torch.Tensor | None = None,
    compile: bool = False,
) -> torch.Tensor:
    """`extend` with m tokens that enter alone, one after the other: shapes, output and errors as there.

    compile: by `compiled` steps, as they are described there; a graph needs none.
    """
    m = q.shape[2]
    as_graph = can_replay(state, m)
    compile = compile and not as_graph
    one = compiled(state, q[:, :, :1], logits) if compile else extend
    if compile and valid is None:  # compiled code is for masks or for none, and for one layout
        valid = torch.ones(len(q), m, dtype=torch.bool, device=q.device)

    def of_step(x, index, dim: int):
        if x is None or torch.is_tensor(index):
            return x if x is None else x.index_select(dim, index)
        x = x.narrow(dim, index, 1)
        return x.clone(memory_format=torch.contiguous_format) if compile else x

    def step(index):
        token = (of_step(x, index, 2) for x in (q, k, v))
        return one(state, *token, of_step(valid, index, 1), logits, of_step(kinds, index, 1))

    out = torch.empty_like(q, memory_format=torch.contiguous_format)  # a thousand small ones would tear memory into pieces
    if not as_graph:
        for index in range(m):
            out.narrow(2, index, 1).copy_(step(index))
        return out
    at = torch.zeros(1, dtype=torch.int64, device=q.device)

    def next_step():
        out.index_copy_(2, at, step(at))
        at.add_(1)

    replay(next_step, m, [at, *state.tensors().values()])
    return out


def can_replay(state: LayerState, steps: int) -> bool:
    """Whether so many steps are worth a graph, and one can be captured: shapes stay what they are, on a GPU."""
    return steps > FEW and state.n.is_cuda and all(part.policy.one_leaves for part in state.parts)


def replay(step: Callable[[], None], times: int, changed: Sequence[torch.Tensor]) -> None:
    """Calls `step` so many times, from a CUDA graph. It changes these tensors in place, and depends on no value on the CPU."""
    before = [tensor.clone() for tensor in changed]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for tensor, value in zip(changed, before):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(times):
        graph.replay()
    torch.cuda.current_stream().synchronize()  # before the graph, and its memory, are gone

"""`extend`, the one verb: new tokens are admitted, and then `decode` takes one, `prompt` many."""

from collections.abc import Callable
from functools import cache
from inspect import unwrap
from types import FunctionType

import torch

from .attend import Logits
from .checks import LessError
from .decode import decode
from .prompt import prompt
from .slots import Tokens, packed, unpacked
from .state import LayerState, Part

LARGEST = 1e12  # a token with larger numbers is broken: their products would leave float32


@torch.no_grad()
def extend(
    state: LayerState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None = None,
    logits: Logits = Logits(),
    kinds: torch.Tensor | None = None,
) -> torch.Tensor:
    """m >= 1 new tokens enter a layer; returns their attention output (N, Hq, m, D) and changes `state` in place.

    q (N, Hq, m, D), rotated and not scaled; k, v (N, Hkv, m, D) in the state's dtype;
    valid (N, m) bool: False for pads, anywhere in the row; pads are not seen, scored, kept, folded or counted, and their
    output is zero; logits: the scale, and what few models do beside; kinds (N, m) integers: of the tokens, for policies that
    need them (FastGen).
    A token that holds NaN, infinity or a number beyond LARGEST in q, k or v leaves no trace, like a pad, but its own output is
    NaN: what is broken shows, and the state goes on as if it had not been.
    Raises LessError (a ValueError) if shapes or dtypes do not fit the state, or kinds are missing.
    """
    _check(state, q, k, v, valid, kinds, logits.sinks)
    (N, Hq, m, D), Hkv = q.shape, k.shape[1]
    if logits.scale is None:
        logits = logits._replace(scale=D**-0.5)
    if logits.sinks is not None:
        logits = logits._replace(sinks=logits.sinks.view(Hkv, -1))  # (Hkv, G)
    broken, tokens = _admit(state, q.view(N, Hkv, Hq // Hkv, m, D), k, v, valid, kinds)
    first = m > 1 and not state.n.any()
    state.n += m if tokens.real is None else tokens.real.sum(1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if len(state.parts) > 1 else None  # (N, Hq, m, D)
    for part in state.parts:
        attention = _enter(part, tokens, state.n, logits, first).flatten(1, 2).to(q.dtype)
        if out is None:
            out = attention
        else:
            out[:, part.query_heads] = attention
    if tokens.real is None:
        return out
    out = out.masked_fill(~tokens.real[:, None, :, None], 0)
    return out.masked_fill_(broken[:, None, :, None], torch.nan)


def _admit(state, q, k, v, valid, kinds):
    """Which tokens are broken (N, m), and all as they enter. q (N, H, G, m, D), k, v (N, H, m, D)."""
    m = k.shape[2]
    if m == 1:
        largest = torch.cat([q.flatten(1, 2), k, v], 1).abs_().amax((1, 3))  # (N, 1)
    else:
        largest = q.abs().amax((1, 2, 4)).maximum(k.abs().amax((1, 3))).maximum(v.abs().amax((1, 3)))  # (N, m)
    finite = largest.to(state.wide) <= LARGEST  # (N, m)
    real = finite if valid is None else finite & valid
    if known_true(real):
        broken = real = None
        position = state.n.int()[:, None]  # (N, 1)
        if m > 1:
            position = position + torch.arange(m, dtype=torch.int32, device=q.device)  # (N, m)
    else:
        broken = ~finite if valid is None else ~finite & valid
        position = torch.where(real, state.n[:, None] + real.cumsum(1) - 1, -1).int()  # (N, m)
        nothing = ~real[:, None, :, None]
        q, k, v = q.masked_fill(nothing[:, None], 0), k.masked_fill(nothing, 0), v.masked_fill(nothing, 0)  # 0 * NaN is NaN
    if state.int8:
        k, v = unpacked(packed(k), state.wide), unpacked(packed(v), state.wide)
    return broken, Tokens(q, k, v, position, real, kinds)


def _enter(part: Part, tokens: Tokens, n, logits: Logits, first: bool):
    """The tokens enter one part of the heads."""
    if part.kv_heads is not None:
        q, k, v = (x.index_select(1, part.kv_heads) for x in (tokens.q, tokens.k, tokens.v))
        tokens = tokens._replace(q=q, k=k, v=v)
        if logits.sinks is not None:
            logits = logits._replace(sinks=logits.sinks[part.kv_heads])
    if tokens.k.shape[2] == 1 and part.policy.one_leaves:
        return decode(part, tokens, n, logits)
    return prompt(part, tokens, n, logits, first)


def compiled(state: LayerState, like: torch.Tensor, logits: Logits = Logits()) -> Callable:
    """`extend` for one token, compiled whole, for states like this one and tokens like q (N, Hq, 1, D).

    torch.compile holds few variants of one piece of code and then gives up, so each kind of state gets a copy of its own.
    What it returns raises LessError if nothing can be compiled, for want of a C++ compiler for example.
    """
    parts = ((part.policies, type(part.kernels), tuple(part.z.shape), part.mean.dtype) for part in state.parts)
    kind = tuple(like.shape), state.kv_heads, state.int8, like.dtype, like.device
    return _compiled(tuple(parts), *kind, logits.scale, logits.softcap, logits.sinks is None)


@cache
def _compiled(*kind_of_state) -> Callable:
    code = unwrap(extend)  # beneath no_grad
    own = FunctionType(code.__code__.replace(), code.__globals__, code.__name__, code.__defaults__)
    step = torch.no_grad()(torch.compile(own, fullgraph=True, dynamic=False))

    def run(*args):
        try:
            return step(*args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise LessError(f"torch cannot compile here, so leave compile out: {str(error).splitlines()[0]}") from error

    return run


def known_true(condition: torch.Tensor) -> bool:
    """Whether all of a tensor of bools is true, if asking costs nothing: on a CPU, in code that is not compiled. What
    depends on it is only work that may be left out."""
    return condition.device.type == "cpu" and not torch.compiler.is_compiling() and bool(condition.all())


def _check(state, q, k, v, valid, kinds, sinks):
    N, m, D = len(state.n), q.shape[2] if q.ndim == 4 else 0, state.head_dim
    wanted = {
        "q": (q, (N, state.query_heads, m, D)),
        "k": (k, (N, state.kv_heads, m, D)),
        "v": (v, (N, state.kv_heads, m, D)),
        "valid": (valid, (N, m)),
        "kinds": (kinds, (N, m)),
        "sinks": (sinks, (state.query_heads,)),
    }
    for name, (x, shape) in wanted.items():
        if m < 1 or (x is not None and x.shape != shape):
            raise LessError(f"{name} has shape {tuple(x.shape)}; this state wants {shape}, with m >= 1 tokens")
    stored = state.parts[0].slots.k.dtype
    fits = q.dtype == stored
    if state.int8:
        fits = q.is_floating_point() and torch.promote_types(q.dtype, torch.float32) == state.wide
    if not (fits and q.dtype == k.dtype == v.dtype):
        holds = f"{stored} of what is no wider than {state.wide}" if state.int8 else stored
        raise LessError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; this state holds {holds}: bring them to one dtype, and leave "
            f"torch.autocast, which mixes them"
        )
    if valid is not None and valid.dtype != torch.bool:
        raise LessError(f"valid must be bool (True for tokens, False for pads), not {valid.dtype}")
    for part in state.parts:
        if kinds is None and part.policy.needs == "kinds":
            asks = part.policies[0]
            raise LessError(f"{asks} needs the kinds of the tokens: give extend kinds, or LessCache.for_model token_kinds")

"""The full cache, the bare policy, Baseline+ and LESS on one text, side by side (the paper's section 4)."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.table import Column, Table
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..hf.architecture import less_layers, sizes
from ..hf.cache import LessCache
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.policies import Policy
from ..setting import Setting
from .caches import held_bytes
from .reading import LOGITS_AT_ONCE, body_and_head

ROWS_AT_ONCE = 64  # windows in one forward pass, at most
NUMBERS_AT_ONCE = 2**24  # of the hidden states of such a pass, at most: all else that a layer computes grows with them
DECODED = 16  # tokens over which the decoding speed is measured
DECODED_ROWS = 8  # sequences that are decoded together


@dataclass
class Row:
    """One line of the comparison. budget: tokens that each KV head keeps (None: all); bytes: held for each sequence."""

    cache: str  # full, bare, baseline+ or less
    policy: str | None
    budget: int | None  # on average if budgets are by head
    budgets: str | None  # uniform, or by head
    kernels: str | None
    perplexity: float
    stderr: float
    recovered: float | None  # share of the perplexity that `gap_of`, bare with uniform budgets, loses to the full cache
    recovered_stderr: float | None
    removed: float | None  # share of the negative log-likelihood that baseline+ with budgets of the same kind loses to it
    removed_stderr: float | None
    bytes: int
    tokens_per_second: float
    gap_of: str | None = None


@dataclass
class Contender:
    """A kind of cache: what it is called, and how to make an empty one that takes a prompt in pieces of `chunk` tokens."""

    cache: str
    policy: Policy | None
    kernels: str | None
    make: Callable[[int | None], Cache]
    budgets: str | None = None
    plus: Policy | None = None  # that of Baseline+ with as many bytes
    asked: Policy | None = None  # the policy that was asked for, whose bare cache, Baseline+ or LESS it is


def compare(
    model: PreTrainedModel,
    windows: torch.Tensor,
    policies: Sequence[Policy],
    kernels: dict[str, LessKernels],
    progress: Callable[[Row], object] = lambda row: None,
    token_kinds: torch.Tensor | None = None,
    int8: bool = False,
    by_head: Sequence[Policy] | None = None,
) -> list[Row]:
    """Measures the full cache, and for each policy the bare policy and, for all kernels by name, Baseline+ and LESS.

    Kernels that know curves for the policy are measured twice: with uniform budgets, and with their budget table, beside
    Baseline+ with its own best table. by_head: if given, such tables are measured under these policies alone, bare ones, too.
    The gap of a policy without a bare row of uniform budgets is that of the first policy of the same budget.

    windows (W, T) int64. Perplexity is streaming (every token enters alone, chunk 1) over all tokens but the first of each
    window, its standard error taken over windows. Bytes are measured from the tensors, and tokens per second over the last
    DECODED tokens of DECODED_ROWS windows, after their beginning went in as one prompt; the caches take turns.
    token_kinds, int8: as `LessCache.for_model` takes them; the full cache is that of transformers all the same.
    Raises LessError if the model's output is not finite.
    """
    caches = list(contenders(model, policies, kernels, token_kinds, int8, by_head=by_head))
    speeds = decode(model, windows[:DECODED_ROWS], caches)
    rows: list[Row] = []
    losses, bare = {}, {}
    for contender, (size, speed) in zip(caches, speeds):
        loss = window_losses(model, windows, contender)  # (W,)
        losses[contender.cache, contender.budgets, contender.policy] = loss
        if contender.cache == "full":
            full = loss
        lost = contender.cache == "bare" and contender.budgets == "uniform"
        if lost:
            bare[contender.asked] = loss
        asked = contender.asked
        same = (policy for policy in bare if asked and policy.budget == asked.budget)  # another one of this budget
        gap_of = asked if asked in bare else next(same, None)
        gains = gap_of is not None and not lost and bare[gap_of].mean() > full.mean()
        recovered, recovered_stderr = share_recovered(full, bare[gap_of], loss) if gains else (None, None)
        equal = losses.get(("baseline+", contender.budgets, contender.plus), full)
        pays = contender.cache == "less" and equal.mean() > full.mean()
        removed, removed_stderr = share_recovered(full, equal, loss, of=torch.Tensor.clone) if pays else (None, None)
        perplexity = math.exp(loss.mean())
        rows.append(
            Row(
                cache=contender.cache,
                policy=repr(contender.policy) if contender.policy else None,
                budget=contender.policy.budget if contender.policy else None,
                budgets=contender.budgets,
                kernels=contender.kernels,
                perplexity=perplexity,
                stderr=perplexity * (loss.std() / len(loss) ** 0.5).item(),
                recovered=recovered,
                recovered_stderr=recovered_stderr,
                removed=removed,
                removed_stderr=removed_stderr,
                bytes=size,
                tokens_per_second=speed,
                gap_of=repr(gap_of) if gains else None,
            )
        )
        progress(rows[-1])
    return rows


def share_recovered(
    full: torch.Tensor, bare: torch.Tensor, other: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor] = torch.exp
) -> tuple[float, float]:
    """(bare - other) / (bare - full) in perplexity, and its standard error: the jackknife over windows, which are paired.

    full, bare, other (W,) mean losses of the same windows; of: what of the mean loss is compared, its exponential by default.
    """

    def share(*means):
        full, bare, other = (of(mean) for mean in means)
        return (bare - other) / (bare - full)

    W = len(full)
    without_one = share(*((x.sum() - x) / (W - 1) for x in (full, bare, other)))  # (W,)
    stderr = ((without_one - without_one.mean()).square().sum() * (W - 1) / W).sqrt()
    return share(full.mean(), bare.mean(), other.mean()).item(), stderr.item()


def contenders(
    model: PreTrainedModel,
    policies: Sequence[Policy],
    kernels: dict[str, LessKernels],
    token_kinds: torch.Tensor | None = None,
    int8: bool = False,
    context: int | None = None,
    by_head: Sequence[Policy] | None = None,
) -> Iterator[Contender]:
    """The caches that `compare` measures, in its order. Kernels without rho sit a learned policy out.

    by_head: see there; context: as `LessCache.for_model` takes it, for all but the full cache.
    """
    yield Contender("full", None, None, lambda chunk: DynamicCache(config=model.config))

    rho = next((learned.without_state() for learned in kernels.values() if "rho" in learned.sizes), None)

    def contender(asked, cache, policy, name=None, table=None, plus=None):
        alone = rho if policy.needs == "rho" else None  # what the bare policy and Baseline+ need

        def make(chunk):
            own = kernels.get(name, alone)
            budgets = table or "uniform"
            return LessCache.for_model(model, policy, own, budgets, chunk, token_kinds, context=context, int8=int8)

        return Contender(cache, policy, name, make, "by head" if table else "uniform", plus, asked)

    def able(policy):
        """The kernels that can serve it, each with the policy of its Baseline+."""
        some = {name: learned for name, learned in kernels.items() if "rho" in learned.sizes or policy.needs != "rho"}
        return some, {name: baseline_plus(model, policy, learned, int8) for name, learned in some.items()}

    def uniform(policy):
        some, plus = able(policy)
        yield contender(policy, "bare", policy)
        for rule in dict.fromkeys(plus.values()):
            yield contender(policy, "baseline+", rule)
        for name in some:
            yield contender(policy, "less", policy, name, plus=plus[name])

    def tables(policy, bare_too):
        some, plus = able(policy)
        for name, learned in some.items():
            table, bare_table = learned.budgets_for(policy), learned.budgets_for(plus[name], less=False)
            if table and bare_table:
                if bare_too and (alone := learned.budgets_for(policy, less=False)):
                    yield contender(policy, "bare", policy, table=alone)
                yield contender(policy, "baseline+", plus[name], table=bare_table)
                yield contender(policy, "less", policy, name, table, plus[name])

    for policy in policies:
        yield from uniform(policy)
        yield from tables(policy, False) if by_head is None else ()
    for policy in by_head or ():
        yield from tables(policy, True)


def baseline_plus(model: PreTrainedModel, policy: Policy, kernels: LessKernels, int8: bool = False) -> Policy:
    """The policy with the smallest budget that holds at least as many bytes as LESS with `policy` (Baseline+)."""
    return Setting.of(sizes(model), less_layers(model), policy, kernels, "uniform", int8=int8).baseline_plus(model.dtype)


def window_losses(model: PreTrainedModel, windows: torch.Tensor, contender: Contender) -> torch.Tensor:
    """Mean negative log-likelihood of each window's tokens after the first, streaming: (W,) float64."""
    means = token_losses(model, windows, contender).double().mean(1)  # (W,)
    if not means.isfinite().all():
        raise LessError(f"the model's output is not finite with the {contender.cache} cache: its weights may hold NaN")
    return means


@torch.inference_mode()
def token_losses(model: PreTrainedModel, windows: torch.Tensor, contender: Contender, rows: int | None = None) -> torch.Tensor:
    """Negative log-likelihood of the tokens of windows (W, T) after the first, streaming: (W, T - 1) float32, on the CPU.

    rows: windows in one forward pass; None: the fewer, the longer they are and the wider the model (NUMBERS_AT_ONCE).
    """
    if rows is None:
        hidden = model.config.get_text_config(decoder=True).hidden_size
        rows = min(ROWS_AT_ONCE, max(1, NUMBERS_AT_ONCE // (windows.shape[1] * hidden)))
    (body, head), losses = body_and_head(model), []
    for ids in windows.to(model.device).split(rows):
        cache = None if contender.cache == "full" else contender.make(1)
        outputs = body(input_ids=ids, past_key_values=cache, use_cache=cache is not None)  # (W, T, hidden or vocabulary)
        for row, targets in zip(outputs, ids):  # some tokens at a time: logits are wide
            parts = zip(row[:-1].split(LOGITS_AT_ONCE), targets[1:].split(LOGITS_AT_ONCE))
            losses.append(torch.cat([cross_entropy(head(some).float(), said, reduction="none").cpu() for some, said in parts]))
    return torch.stack(losses)  # (W, T - 1)


@torch.inference_mode()
def decode(model: PreTrainedModel, windows: torch.Tensor, contenders: list[Contender]) -> list[tuple[int, float]]:
    """(bytes held for each sequence, tokens per second) of each contender, decoding the ends of the windows in turns."""
    windows = windows.to(model.device)
    prompts, ends = windows[:, :-DECODED], windows[:, -DECODED:]
    caches = [contender.make(None) for contender in contenders]
    for cache in caches:
        model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds: list[list[float]] = [[] for _ in contenders]
    for step in range(DECODED):
        for cache, spent in zip(caches, seconds):
            wait(model.device)
            start = time.perf_counter()
            model(input_ids=ends[:, step : step + 1], past_key_values=cache, use_cache=True)
            wait(model.device)
            spent.append(time.perf_counter() - start)
    return [(held_bytes(cache) // len(windows), len(windows) / median(spent)) for cache, spent in zip(caches, seconds)]


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_name(row: Row) -> str:
    """What a table calls the cache of a row."""
    return {"less": f"LESS, {row.kernels}", "baseline+": "Baseline+"}.get(row.cache, row.cache)


def spell_share(part: float | None, stderr: float | None) -> str:
    """A share with its standard error, to read; empty if there is none."""
    return "" if part is None else f"{part:.1%} ± {stderr:.1%}"


def table(rows: list[Row], title: str) -> Table:
    """The rows to print, a section for each policy."""
    right = ("budget", "perplexity", "± s.e.", "gap recovered", "equal memory", "bytes/sequence", "tokens/s")
    lines = Table("cache", "policy", *(Column(heading, justify="right") for heading in right), title=title)
    for row in rows:
        if row.cache == "bare":
            lines.add_section()
        lines.add_row(
            cache_name(row),
            row.policy or "",
            "all" if row.budget is None else f"{row.budget}{', by head' * (row.budgets == 'by head')}",
            f"{row.perplexity:.2f}",
            f"{row.stderr:.2f}",
            spell_share(row.recovered, row.recovered_stderr),
            spell_share(row.removed, row.removed_stderr),
            f"{row.bytes:,}",
            f"{row.tokens_per_second:,.0f}",
        )
    return lines

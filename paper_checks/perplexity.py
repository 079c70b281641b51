"""What is predicted through the caches: perplexity (table 2), random features, budgets by head, long sequences, retrieval."""

from dataclasses import asdict

import torch

from less_fast import LessKernels
from less_fast.measuring.compare import Row, cache_name, compare, spell_share
from less_fast.setting import POLICIES

from .check import UNMEASURED, Finding, Subject, claim, verdict

CONTROLS = ("performer", "elu")
PARTS = 8  # of a window
CACHES = ("full", "bare", "LESS")
HEADINGS = ["policy", "cache", "tokens kept", "budgets", "perplexity", "gap recovered", "of Baseline+'s loss", "bytes/sequence"]


def line(row: Row) -> list[str]:
    """A row of `compare` under HEADINGS."""
    kept = "all" if row.budget is None else str(row.budget)
    perplexity = f"{row.perplexity:.2f} ± {row.stderr:.2f}"
    shares = spell_share(row.recovered, row.recovered_stderr), spell_share(row.removed, row.removed_stderr)
    return [(row.policy or "").split("(")[0], cache_name(row), kept, row.budgets or "", perplexity, *shares, f"{row.bytes:,}"]


@claim("LESS beats the bare policy, and Baseline+ of the same memory", "WikiText, Llama 2 7B, H2O at 2 %: 13.33 bare, 10.75 LESS")
def perplexity(subject: Subject) -> Finding:
    rows = compare(subject.model, subject.windows(64), subject.policies(), subject.families())
    equal, parts = {}, []
    for row in rows:
        if row.cache in ("bare", "baseline+"):
            equal[row.cache, row.budgets] = row.perplexity
        if row.cache == "less":
            parts += [row.perplexity < equal["bare", "uniform"], row.perplexity < equal["baseline+", row.budgets]]
    sentence = f"in {sum(parts)} of {len(parts)} comparisons LESS has the lower perplexity; full cache {rows[0].perplexity:.2f}"
    return Finding(verdict(parts), sentence, {"rows": [asdict(row) for row in rows]}, HEADINGS, [*map(line, rows)])


@claim("Learned kernels are needed: H2O with Performer's features is worse than LESS", "worse than LESS (section 4)")
def performer(subject: Subject) -> Finding:
    torch.manual_seed(subject.seed)
    shape = {name: subject.kernels.sizes[name] for name in ("layers", "query_heads", "kv_heads", "head_dim")}
    controls = {family: LessKernels(**shape, family=family).requires_grad_(False).to(subject.model.device) for family in CONTROLS}
    learned = subject.paper_kernels or subject.kernels
    rows = compare(subject.model, subject.windows(32), subject.policies(), {"learned": learned, **controls})
    less = [row for row in rows if row.cache == "less" and row.budgets == "uniform"]
    best = {row.budget: row.perplexity for row in less if row.kernels == "learned"}
    parts = [row.perplexity > best[row.budget] if row.kernels != "learned" else row.recovered > 0 for row in less]
    ours, theirs = (", ".join(f"{row.recovered:.1%}" for row in less if row.kernels == name) for name in ("learned", "performer"))
    sentence = f"of the gap, learned kernels recover {ours}, Performer's {theirs}"
    figures = {"recovered": {f"{row.kernels}, {row.budget}": row.recovered for row in less}}
    return Finding(verdict(parts), sentence, figures, HEADINGS, [*map(line, less)])


@claim("Budgets by head: LESS still removes much of what the best bare table of the same memory loses", "not in the paper")
def unequal_budgets(subject: Subject) -> Finding:
    rules = [rule for rule in POLICIES.values() if type(rule).__name__ in subject.kernels.curves]
    if not rules:
        return Finding(UNMEASURED, "these kernels know no curves: measure some with `less-kv allocate`", {})
    windows, policies = subject.windows(64), [rule.with_budget(one.budget) for rule in rules for one in subject.policies()]
    rows = [row for row in compare(subject.model, windows, policies, {"ours": subject.kernels}) if row.budgets == "by head"]
    less = [row for row in rows if row.cache == "less"]
    removed = [row.removed for row in less if row.removed is not None]
    share = f"{min(removed):.0%} to {max(removed):.0%}"
    sentence = f"of the loss that the best bare table of the same memory still has, LESS removes {share}"
    figures = {f"{row.policy}, {row.cache}": {"recovered": row.recovered, "removed": row.removed} for row in rows}
    return Finding(verdict([(row.removed or 0) > 0 for row in less]), sentence, figures, HEADINGS, [*map(line, rows)])


@claim("Gains persist at long sequences", "gains hold with growing length")
@torch.inference_mode()
def long_sequences(subject: Subject) -> Finding:
    """The mean loss in each eighth of the windows."""
    model, policy = subject.model, subject.policies()[0]
    windows, total = subject.windows(32).to(model.device), {}
    for ids in windows.split(8):
        for name, cache in subject.caches(policy).items():
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            nats = -logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (W, T - 1)
            parts = torch.stack([part.mean() for part in nats.tensor_split(PARTS, dim=1)]).double()  # (PARTS,)
            total[name] = total.get(name, 0) + parts * len(ids) / len(windows)
    share = (total["bare"] - total["LESS"]) / (total["bare"] - total["full"])  # of what the bare policy loses
    rows = [
        [f"{part + 1}/{PARTS}", *(f"{total[name][part]:.3f}" for name in CACHES), f"{share[part]:.1%}"] for part in range(PARTS)
    ]
    sentence = (
        f"of the loss that {policy} adds LESS removes {share[1]:.0%} in the second eighth of {windows.shape[1]} tokens and "
        f"{share[-1]:.0%} in the last"
    )
    figures = {name: loss.tolist() for name, loss in total.items()} | {"share": share.tolist()}
    holds = (share[PARTS // 2 :] > 0).tolist()
    return Finding(verdict(holds), sentence, figures, ["part of the window", *CACHES, "removed"], rows)


@claim("Exact retrieval from far back: LESS keeps what the full cache can do", "not in the paper; known to fail under eviction")
@torch.inference_mode()
def retrieval(subject: Subject) -> Finding:
    """A list of random tokens comes twice: the share of the second's that are predicted right, by how many lie between."""
    model, policy = subject.model, subject.policies()[-1]
    rows, figures, kept = [], {}, []
    rng = torch.Generator().manual_seed(subject.seed)
    lists = 2 if subject.quick else 16
    for length in (32,) if subject.quick else (16, 64, 192, 448):
        first = torch.randint(1, model.config.vocab_size, (lists, length), generator=rng)
        ids = torch.cat([first, first], 1).to(model.device)
        right = {}
        for name, cache in subject.caches(policy, spread=None).items():
            guesses = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, length:-1].argmax(-1)
            right[name] = (guesses == ids[:, length + 1 :]).float().mean().item()
        rows.append([str(length), *(f"{right[name]:.1%}" for name in CACHES)])
        figures[length] = right
        kept.append(right["LESS"] >= 0.9 * right["full"])
    last = figures[max(figures)]
    sentence = (
        f"of random lists of {max(figures)} tokens the full cache copies {last['full']:.0%}, {policy} {last['bare']:.0%}, LESS "
        f"{last['LESS']:.0%}"
    )
    return Finding(verdict(kept), sentence, figures, ["tokens", *CACHES], rows)

"""One case in both paths: the same bits for each, one chunk at a time, and what the two states must have in common."""

from dataclasses import replace

import numpy as np
import torch
from closeness import assert_close, error, error_before_rounding
from histories import evicting_nothing, replaying
from strategies import fast_kernels, slices

import less_fast
import less_ref


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def allocate(case, rows=1, dtype=torch.float64, **instead):
    layer, kernels = case.layer, fast_kernels(case.kernels, case.layer, wide(dtype), case.rho)
    arguments = dict(policy=case.fast, kernels=kernels, int8=case.int8) | instead
    return less_fast.LayerState.allocate(
        batch=rows,
        query_heads=layer.query_heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        dtype=dtype,
        **arguments,
    )


def empty(case):
    """The reference's state before the first token, which a context may move."""
    return less_ref.Stream(less_ref.empty_state(case.layer.kv_heads, case.layer.head_dim, case.kernels).heads)


def batch(case, rows=1, dtype=torch.float64):
    """q, k, v of `rows` sequences in one batch, (rows, H, T, D)."""
    return tuple(torch.from_numpy(np.stack(x)).to(dtype) for x in zip(*(case.qkv(row) for row in range(rows))))


def kinds_of(case, rows=1):
    """(rows, T): the kinds of the tokens of those sequences."""
    return torch.from_numpy(np.stack([case.kinds(row) for row in range(rows)]))


def widened(row):
    """The same bits for the reference."""
    return tuple(x.double().numpy() for x in row)


def at(qkv, now):
    return tuple(x[..., now, :] for x in qkv)


def with_pads(qkv, valid, fill=torch.nan):
    """Pads hold NaN, which shows wherever one leaks, or something that looks like a token."""
    pads = ~torch.from_numpy(valid)[:, None, :, None]
    return tuple(x.masked_fill(pads, fill) for x in qkv)


def rounded(kernels, dtype):
    """The reference's kernels with the bits that the fast path's have in that dtype."""
    weights = {name: x for name, x in vars(kernels or ()).items() if isinstance(x, np.ndarray)} if kernels else {}
    return kernels and replace(kernels, **{name: torch.tensor(x).to(dtype).double().numpy() for name, x in weights.items()})


def extend(case, state, qkv, now, valid=None, kinds=None):
    """The fast path's on one chunk of a batch."""
    kinds = kinds_of(case, len(state.n)) if kinds is None else kinds
    valid = None if valid is None else torch.from_numpy(valid[:, now])
    return less_fast.extend(state, *at(qkv, now), valid, logits_of(case), kinds[:, now])


def logits_of(case):
    return less_fast.Logits(case.scale, case.softcap, None if case.sinks is None else torch.from_numpy(case.sinks))


def extend_reference(case, state, row, policies, kernels=None):
    """The reference's on q, k, v of one row's chunk."""
    kernels, (q, *kv) = case.kernels if kernels is None else kernels, row
    k, v = map(less_ref.in_eight_bits, kv) if case.int8 else kv
    return less_ref.extend(state, q, k, v, policies, kernels, case.scale, case.attention)


def heads_of(state, row, with_kinds=True):
    """A row's KV heads in order, each a less_ref.Head sorted by position. with_kinds False: scores as the reference has them,
    without the token's kind."""
    heads = []
    for g, policy in enumerate(state.policies()):
        held = {name: x.double().numpy() for name, x in state.head(row, g).items()}
        if policy.needs == "kinds" and not with_kinds:
            held["score"] = held["score"][:, 1:]
        heads.append(less_ref.Head(**held))
    return heads


def positions(state, row):
    return [head.position for head in heads_of(state, row)]


def room(policy, head, n):
    """How many of a head's entries the policy keeps."""
    ranks = policy.rank(head.position, head.score, n)
    return min(policy.budget, (ranks > -np.inf).sum())


def assert_same_state(state, row, reference):
    assert state.n[row] == reference.n
    for got, wanted in zip(heads_of(state, row, with_kinds=False), reference.heads, strict=True):
        order = np.argsort(wanted.position)
        for name in ("position", "k", "v"):
            assert np.array_equal(getattr(got, name), getattr(wanted, name)[order])
        for name in ("H", "z"):
            assert_close(getattr(got, name), getattr(wanted, name))
        assert_close(got.score, wanted.score[order].reshape(got.score.shape))


def assert_identical(one, other):
    for (name, a), (other_name, b) in zip(one.tensors().items(), other.tensors().items(), strict=True):
        assert (name, a.dtype) == (other_name, b.dtype)
        assert torch.equal(a, b), name


def assert_extends_alike(case, state, reference, qkv, chunks):
    """One row, chunk by chunk, in both paths; returns the reference's state at the end."""
    for now in chunks:
        out = extend(case, state, qkv, now)
        row = widened(x[0] for x in at(qkv, now))
        expected, reference = extend_reference(case, reference, row, case.reference_of(case.kinds(0)))
        assert_close(out[0].transpose(0, 1), expected)
        assert_same_state(state, 0, reference)
    return reference


def assert_rows_equal_the_reference_alone(case, state, references, qkv, valid):
    """Every row of a padded batch, chunk by chunk; returns the reference's states at the end."""
    policies = [case.reference_of(case.kinds(row)[tokens]) for row, tokens in enumerate(valid)]
    for now in slices(case.chunks):
        out = extend(case, state, qkv, now, valid)
        for row, tokens in enumerate(valid[:, now]):
            assert not out[row, :, ~tokens].any()
            if tokens.any():
                real = widened(x[row][:, tokens] for x in at(qkv, now))
                expected, references[row] = extend_reference(case, references[row], real, policies[row])
                assert_close(out[row][:, tokens].transpose(0, 1), expected)
            assert_same_state(state, row, references[row])
    return references


def lower_precision_errors(case, dtype):
    """The largest error of each kind over all chunks of a case; rank: by how much a victim outranks what was kept."""
    state, reference, qkv = allocate(case, dtype=dtype), empty(case), batch(case, dtype=dtype)
    kernels = rounded(case.kernels, wide(dtype))
    errors = dict.fromkeys(("out", "score", "H", "z", "rank", "first"), 0.0)
    policies = case.reference_of(case.kinds(0))
    unscored = not all(policy.fast.queries != 0 for policy in case.policies)

    def note(what, actual, expected):
        errors[what] = max(errors[what], error(actual, expected))

    for now in slices(case.chunks):
        row = widened(x[0] for x in at(qkv, now))
        out = extend(case, state, qkv, now)
        kept = positions(state, 0)
        _, all_held = extend_reference(case, reference, row, evicting_nothing(policies), kernels)
        gone = [np.setdiff1d(head.position, stays) for head, stays in zip(all_held.heads, kept)]
        expected, reference = extend_reference(case, reference, row, replaying(policies, gone), kernels)
        for policy, head, held in zip(policies, all_held.heads, kept):
            assert len(held) == room(policy, head, now.stop)
            assert np.isin(held, head.position).all()
            rank, stays = policy.rank(head.position, head.score, now.stop).astype(float), np.isin(head.position, held)
            if not stays.all():
                lowest_kept, highest_gone = rank[stays].min(), rank[~stays].max()
                excess = 0.0 if highest_gone <= lowest_kept else highest_gone - lowest_kept
                errors["rank"] = max(errors["rank"], excess / max(1.0, abs(lowest_kept)))
        name, measure = ("first", error) if unscored and now.start == 0 else ("out", error_before_rounding)
        errors[name] = max(errors[name], measure(out[0].transpose(0, 1), expected))
        for got, wanted in zip(heads_of(state, 0, with_kinds=False), reference.heads):
            order = np.argsort(wanted.position)
            assert np.array_equal(got.k, wanted.k[order])
            assert np.array_equal(got.v, wanted.v[order])
            note("score", got.score, wanted.score[order])
            note("H", got.H, wanted.H)
            note("z", got.z, wanted.z)
    return errors

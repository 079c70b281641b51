"""Numbers of the authors' public code (official_vectors/README.md): both paths reproduce them.

Where the authors add 1e-6 or clamp at it, their numbers are compared twice: directly, at the size of that change, and
tightly, after the same change has been made to ours. That is done outside both paths, which have no epsilon.
"""

import numpy as np
import pytest
import torch
from authors import FOLDER, kernels_of, read, save_as_the_authors
from closeness import assert_close
from strategies import fast_kernels, slices

import less_fast
import less_ref
from less_fast.layer import parallel as fast

GENERATION = sorted(path.name for path in FOLDER.glob("D_*.npz"))
TRAINING = sorted(path.name for path in FOLDER.glob("B_*.npz"))
EPSILON = 1e-6
TIGHT = 1e-12


def reference_kernels(file):
    return less_ref.Kernels(**{name: weight.numpy() for name, weight in kernels_of(file).items()}) if "w_q1" in file else None


def generated(name):
    """A generation file as (file, (q, k, v), policy's name and fields, chunks)."""
    file = read(name)
    fields = int(file["heavy"]), int(file["recent"])
    chunks = [int(file["prompt_len"])] + [1] * int(file["steps"])
    return file, [file[x][0] for x in "qkv"], ("Lambda" if "lambda" in name else "H2O", fields), chunks


def as_kept(positions, like):
    """A list of positions for each KV head, as the authors' mask."""
    mask = np.zeros_like(like)
    for g, some in enumerate(positions):
        mask[g, some] = 1
    return mask


def assert_output_is_the_authors(out, file, q, k, v, kernels, chunks):
    """out (T, Hq, D). Token by token, they clamp phi at 1e-6 in the numerator, and phi.z at 1e-6 in the denominator."""
    theirs = file["pre"][0].reshape(out.shape)
    prompt = chunks[0]
    assert_close(out[:prompt], theirs[:prompt], TIGHT)
    if kernels is None:
        assert_close(out, theirs, TIGHT)
        return
    assert_close(out, theirs, 2e-5)
    G, D = q.shape[0] // k.shape[0], q.shape[2]
    clamped = out.copy()
    for step, i in enumerate(range(prompt, len(out))):
        for a in range(q.shape[0]):
            g = a // G
            phi, H, z = kernels.phi(q[a, i], a), file["H_after"][step, g], file["z_after"][step, g]
            exact = (file["mask_used"][step, g] * np.exp(D**-0.5 * k[g] @ q[a, i])).sum()
            numerator = out[i, a] * (exact + phi @ z) + (np.maximum(phi, EPSILON) - phi) @ H
            clamped[i, a] = numerator / (exact + max(phi @ z, EPSILON))
    assert_close(clamped, theirs, TIGHT)


@pytest.mark.parametrize("name", GENERATION)
def test_the_reference_generates_as_the_authors_code(name):
    file, (q, k, v), (policy, fields), chunks = generated(name)
    kernels = reference_kernels(file)
    trace = less_ref.run(q, k, v, getattr(less_ref, policy)(*fields), kernels, chunks)
    for c, kept in enumerate(trace.kept):
        assert np.array_equal(as_kept(kept, file["keep_after"][c]), file["keep_after"][c])
        if policy == "H2O":
            for g, positions in enumerate(kept):
                assert_close(trace.heads[c][g].score, file["scores_after"][c, g, positions], TIGHT)
    if kernels is not None:
        assert_close([[head.H for head in heads] for heads in trace.heads], file["H_after"], TIGHT)
        assert_close([[head.z for head in heads] for heads in trace.heads], file["z_after"], TIGHT)
    assert_output_is_the_authors(trace.out, file, q, k, v, kernels, chunks)


@pytest.mark.parametrize("name", GENERATION)
def test_the_fast_path_generates_as_the_authors_code(name):
    file, (q, k, v), (policy, fields), chunks = generated(name)
    kernels, outs = reference_kernels(file), []
    state = less_fast.LayerState.allocate(
        getattr(less_fast, policy)(*fields), 1, q.shape[0], k.shape[0], q.shape[2], fast_kernels(kernels), torch.float64
    )
    group = state.parts[0]
    for c, now in enumerate(slices(chunks)):
        outs.append(less_fast.extend(state, *(torch.from_numpy(x[None, :, now]) for x in (q, k, v)))[0].transpose(0, 1))
        position = group.slots.positions()[0].numpy()
        kept = [some[some >= 0] for some in position]
        assert np.array_equal(as_kept(kept, file["keep_after"][c]), file["keep_after"][c])
        if policy == "H2O":
            for g, some in enumerate(position):
                assert_close(group.slots.scores()[0, g, some >= 0], file["scores_after"][c, g, some[some >= 0]], TIGHT)
        if kernels is not None:
            assert_close(group.H[0], file["H_after"][c], TIGHT)
            assert_close(group.z[0], file["z_after"][c], TIGHT)
    assert_output_is_the_authors(torch.cat(outs).numpy(), file, q, k, v, kernels, chunks)


def as_the_authors(out, q, k, v, e, kernels):
    """Our output with the authors' epsilon: with S the sum of all weights, (S out + 1e-6 sum of folded v) / (S + 1e-6).

    They add 1e-6 to each low-rank weight in the numerator, and once to the denominator.
    out, q (N, Hq, T, D); k, v (N, Hkv, T, D); e (N, Hkv, T).
    """
    G, T = q.shape[1] // k.shape[1], q.shape[2]
    k, v, e, psi = (x.repeat_interleave(G, 1) for x in (k, v, e, kernels.psi(k)))
    i = torch.arange(T)
    visible, folded = (i <= i[:, None]) & (i[:, None] <= e[:, :, None]), i[:, None] > e[:, :, None]
    weights = visible * torch.exp(q.shape[-1] ** -0.5 * q @ k.mT) + folded * (kernels.phi(q) @ psi.mT)
    total = weights.sum(-1, keepdim=True)
    return (total * out + EPSILON * folded.double() @ v) / (total + EPSILON)


def test_streaming_equals_the_authors_parallel_form_in_both_paths():
    file = read("C_par_llama_less_lambda_dyn_f64.npz")
    sinks, recent = int(file["heavy"]), int(file["recent"])
    reference = reference_kernels(file)
    q, k, v = (torch.from_numpy(file[x]) for x in "qkv")
    traces = [
        less_ref.run(file["q"][b], file["k"][b], file["v"][b], less_ref.Lambda(sinks, recent), reference) for b in range(len(q))
    ]
    streamed = torch.from_numpy(np.stack([trace.out for trace in traces])).transpose(1, 2)
    state = less_fast.LayerState.allocate(
        less_fast.Lambda(sinks, recent),
        len(q),
        q.shape[1],
        k.shape[1],
        q.shape[3],
        fast_kernels(reference),
        torch.float64,
    )
    extended = torch.cat([less_fast.extend(state, *(x[:, :, [i]] for x in (q, k, v))) for i in range(q.shape[2])], 2)
    e = fast.eviction_times(q, k, v, less_fast.Lambda(sinks, recent))
    parallel = fast.parallel(q, k, v, e, fast_kernels(reference))
    theirs = torch.from_numpy(file["pre"]).unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    for ours in (streamed, extended, parallel):
        assert_close(ours, theirs, 2e-4)
        assert_close(as_the_authors(ours, q, k, v, e, fast_kernels(reference)), theirs, TIGHT)


def training(name):
    """A training file as (file, q, k, v in heads and float64, eviction times from its low-rank mask: T for never)."""
    file = read(name)
    q, k, v = (torch.from_numpy(file[x]).double().unflatten(2, (-1, 8)).transpose(1, 2) for x in "qkv")
    folded = torch.from_numpy(file["lr_mask"])  # (N, Hkv, query, token)
    T = q.shape[2]
    e = torch.where(folded.any(2), folded.int().argmax(2) - 1, T)
    assert torch.equal(folded, torch.arange(T)[:, None] > e[:, :, None])  # one number for each token says it all
    return file, q, k, v, e


def merged(out):
    """(N, Hq, T, D) -> (N, T, Hq * D)."""
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", TRAINING)
def test_the_parallel_form_gives_the_authors_training_prediction_in_both_paths(name):
    file, q, k, v, e = training(name)
    reference = reference_kernels(file)
    times = np.where(e == q.shape[2], np.inf, e)
    ours = [
        torch.from_numpy(
            np.stack([less_ref.parallel(*(x[b].numpy() for x in (q, k, v)), times[b], reference) for b in (0, 1)])
        ).transpose(1, 2),
        fast.parallel(q, k, v, e, fast_kernels(reference)),
    ]
    for out in ours:
        assert_close(merged(out), file["pred"], 2e-5)
        assert_close(merged(as_the_authors(out, q, k, v, e, fast_kernels(reference))), file["pred"], TIGHT)


@pytest.mark.parametrize("name", TRAINING)
def test_full_attention_is_the_authors_training_target_in_both_paths(name):
    file, q, k, v, e = training(name)
    never = np.full(e.shape, np.inf)
    reference = [less_ref.parallel(*(x[b].numpy() for x in (q, k, v)), never[b]) for b in (0, 1)]
    assert_close(np.stack(reference).reshape(file["target_out"].shape), file["target_out"], TIGHT)
    assert_close(merged(fast.parallel(q, k, v, torch.full_like(e, q.shape[2]))), file["target_out"], TIGHT)


@pytest.mark.parametrize("name", TRAINING)
def test_the_training_loss_is_the_authors_but_for_one_query_whose_error_is_zero(name):
    """They average over all queries from `heavy + recent` on, we from the first that misses a token, one later."""
    file, _, _, _, e = training(name)
    T, budget = file["pred"].shape[1], int(file["heavy"] + file["recent"])
    times, projection = np.where(e == T, np.inf, e), file["Wo"].astype(float).T
    ours = np.mean(
        [
            less_ref.training_loss(*(file[x][b].reshape(T, 3, -1) for x in ("pred", "target_out")), projection, times[b])
            for b in (0, 1)
        ]
    )
    assert_close(ours * (T - budget - 1) / (T - budget), file["train_loss"], 1e-10)


@pytest.mark.parametrize("name", TRAINING)
def test_gradients_of_all_kernels_are_the_authors(name):
    """With their epsilon tightly, and without it at its size; relative to each gradient's largest element."""
    file, q, k, v, e = training(name)
    target, Wo = torch.from_numpy(file["target_out"]), torch.from_numpy(file["Wo"]).double()
    budget = int(file["heavy"] + file["recent"])
    names = {"q1": "kernel_q_mat1", "q2": "kernel_q_mat2", "k1": "kernel_k_mat1", "k2": "kernel_k_mat2"}
    names |= {"ik": "interaction_k", "sD": "scalingD", "sD2": "scalingD2"}
    for epsilon, tolerance in ((True, 1e-10), (False, 1e-4)):
        kernels = fast_kernels(reference_kernels(file)).requires_grad_()
        out = fast.parallel(q, k, v, e, kernels)
        if epsilon:
            out = as_the_authors(out, q, k, v, e, kernels)
        difference = (merged(out) - target) @ Wo.T
        difference[:, budget:].square().mean().backward()
        factors = {name: torch.from_numpy(file[f"w_{name}"]).double().requires_grad_() for name in names}
        for name, matrix in kernels_of(file, factors).items():
            matrix.backward(getattr(kernels, name).grad)  # on to the factors
        for name, theirs in names.items():
            expected = file.get(f"grad_{theirs}", file.get(f"grad_{theirs}.weight"))
            assert_close(factors[name].grad / np.abs(expected).max(), expected / np.abs(expected).max(), tolerance)


@pytest.mark.parametrize("name", [name for name in GENERATION if "w_q1" in read(name)])
def test_imported_checkpoints_hold_the_authors_state(name, tmp_path):
    """What they write is what we read: the state after every token, in the float32 of stored kernels."""
    file, (q, k, v), (policy, fields), chunks = generated(name)
    save_as_the_authors(file, tmp_path, layers=11)
    kernels = less_fast.LessKernels.from_official(tmp_path)
    assert len(kernels.layers) == 11
    assert kernels.about["settings"]["model_name"] == "llama2"
    kernels.save_pretrained(tmp_path / "ours")
    layer = less_fast.LessKernels.from_pretrained(tmp_path / "ours").double().layers[10]
    rule = getattr(less_fast, policy)(*fields)
    state = less_fast.LayerState.allocate(rule, 1, q.shape[0], k.shape[0], q.shape[2], layer, torch.float64)
    for c, now in enumerate(slices(chunks)):
        less_fast.extend(state, *(torch.from_numpy(x[None, :, now]) for x in (q, k, v)))
        assert_close(state.parts[0].H[0], file["H_after"][c], 1e-5)
        assert_close(state.parts[0].z[0], file["z_after"][c], 1e-5)


class Unwanted:
    """Says that it was unpickled."""

    unpickled = False

    def __reduce__(self):
        return setattr, (Unwanted, "unpickled", True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: [file.unlink() for file in folder.iterdir()], "holds no layer_"),
        (lambda folder: (folder / "layer_1.pth").unlink(), "holds 2 layers, but not layers 0 to 1"),
        (lambda folder: (folder / "layer_1.pth").write_bytes(b"nothing"), "layer_1.pth is no layer of the authors' kernels"),
        (lambda folder: torch.save({"weights": 1}, folder / "layer_1.pth"), "layer_1.pth is no layer of the authors' kernels"),
        (lambda folder: torch.save(Unwanted(), folder / "layer_1.pth"), "layer_1.pth is no layer of the authors' kernels"),
        (lambda folder: save_as_the_authors(read("D_gen_falcon_less_h2o_long_dyn_f64.npz"), folder, 2), "differ in shape"),
    ],
    ids=["none", "a gap", "not torch's", "other content", "any object", "two kinds"],
)
def test_folders_that_are_no_checkpoint_are_refused(tmp_path, spoil, message):
    save_as_the_authors(read("D_gen_llama_less_h2o_long_dyn_f64.npz"), tmp_path, 3)
    spoil(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        less_fast.LessKernels.from_official(tmp_path)
    assert not Unwanted.unpickled

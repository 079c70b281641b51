"""Rows come and go: caches are joined into one batch and rows are taken out, and each row stays what it is alone."""

import hypothesis.strategies as st
import pytest
import torch
from caches import FASTGEN, KINDS, assert_same_states, feed, generate, left_padded
from closeness import assert_close
from hypothesis import given, settings
from models import make_kernels, make_kinds, make_model, tokens

from less_fast import H2O, TOVA, Lambda, LayerKernels, LayerState, LessCache, LessError, Scissorhands, SnapKV, Window
from paper_checks.architectures import tiny

MODEL = make_model()
KERNELS = make_kernels(MODEL, rank=[3, 2, 1])
SAME_RANK = make_kernels(MODEL)
TABLE = [[3, 9], [5, 5], [12, 2]]
SETTINGS = {
    "h2o": (H2O(3, 2), KERNELS, None),
    "h2o by head": (H2O(3, 2), KERNELS, TABLE),
    "h2o by head, bare": (H2O(3, 2), None, TABLE),
    "lambda by head": (Lambda(1, 3), KERNELS, TABLE),
    "scissorhands": (Scissorhands(5, 2, 4), KERNELS, None),
    "snapkv by head": (SnapKV(5, 2, 1), KERNELS, TABLE),
    "tova": (TOVA(4), SAME_RANK, None),
    "fastgen by head": (FASTGEN, KERNELS, TABLE),
    "full": (Window(999), None, None),
}


def make_cache(policy, kernels, budgets):
    return LessCache.for_model(MODEL, policy, kernels, budgets, token_kinds=KINDS)


class Rows:
    """A batch whose rows come and go, and each row in a cache of its own; mask: (N, columns), pads in front are 0."""

    def __init__(self, setting):
        self.setting, self.cache, self.alone, self.seed = setting, None, [], 0
        self.mask = torch.zeros(0, 0, dtype=torch.long)

    def tokens(self, *shape):
        self.seed += 1
        return tokens(*shape, seed=self.seed)

    def come(self, lengths, in_front):
        """Prompts of these lengths come together, padded, before or behind the rows that are there."""
        width = max(lengths)
        ids, mask = self.tokens(len(lengths), width), left_padded(lengths, width)[1]
        new, singles = make_cache(*self.setting), [make_cache(*self.setting) for _ in lengths]
        self.read(new, ids, mask)
        for row, (length, single) in enumerate(zip(lengths, singles)):
            feed(MODEL, ids[row : row + 1, width - length :], single, prompt=length)
        if self.cache is None:
            self.cache, self.alone, self.mask = new, singles, mask
            return
        both = [(self.cache, self.alone, self.mask), (new, singles, mask)][:: -1 if in_front else 1]
        columns = max(self.mask.shape[1], width)
        self.mask = torch.cat([torch.nn.functional.pad(mask, (columns - mask.shape[1], 0)) for *_, mask in both])
        self.cache = LessCache.join([cache for cache, *_ in both])
        self.alone = [single for _, alone, _ in both for single in alone]

    def stay(self, rows):
        self.cache.batch_select_indices(rows)
        self.alone, self.mask = [self.alone[row] for row in rows], self.mask[rows]

    def go_on(self, m, with_mask):
        """m tokens more in every row, at once."""
        ids = self.tokens(len(self.alone), m)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        positions = self.cache.lengths[:, None] + torch.arange(m)  # (N, m)
        assert torch.equal(positions, self.mask.cumsum(1)[:, -m:] - 1)
        mask = self.mask if with_mask or m > 1 else None
        with torch.no_grad():
            logits = MODEL(ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache).logits
        for row, single in enumerate(self.alone):
            assert_close(logits[row : row + 1], feed(MODEL, ids[row : row + 1], single, prompt=m))
        assert_same_states(self.cache, self.alone, [0] * len(self.alone))

    def read(self, cache, ids, mask):
        with torch.no_grad():
            MODEL(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)


ARRIVALS = st.tuples(st.just("come"), st.lists(st.integers(1, 20), min_size=1, max_size=2), st.booleans())
EVENTS = st.one_of(
    ARRIVALS,
    st.tuples(st.just("stay"), st.integers(0, 2**16)),
    st.tuples(st.just("go on"), st.sampled_from([1, 1, 1, 4]), st.booleans()),
)


@pytest.mark.parametrize("setting", SETTINGS)
@settings(max_examples=settings().max_examples // 10)
@given(first=ARRIVALS, events=st.lists(EVENTS, max_size=12))
def test_a_row_of_a_batch_whose_rows_come_and_go_is_the_row_alone(setting, first, events):
    rows = Rows(SETTINGS[setting])
    for what, *how in [first, *events, ("go on", 1, False)]:
        if what == "come":
            rows.come(*how)
        elif what == "go on":
            rows.go_on(*how)
        else:  # any rows in any order, at least one
            order = torch.randperm(len(rows.alone), generator=torch.Generator().manual_seed(how[0])).tolist()
            rows.stay(order[: 1 + how[0] % len(order)])


def test_joined_conversations_go_on_in_generate_as_they_would_alone():
    caches = [make_cache(*SETTINGS["h2o by head"]) for _ in range(3)]
    texts = [generate(MODEL, tokens(1, length, seed=length), cache, new=4) for length, cache in zip((14, 5, 9), caches)]
    texts = [torch.cat([text, tokens(1, 3, seed=7)], 1) for text in texts]  # the last of them has not been fed
    joined = LessCache.join(caches)
    ids = torch.cat([torch.nn.functional.pad(text, (21 - text.shape[1], 0)) for text in texts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(text), (21 - text.shape[1], 0)) for text in texts])
    out = generate(MODEL, ids, joined, mask)
    for row, (text, cache) in enumerate(zip(texts, caches)):
        assert torch.equal(generate(MODEL, text, cache)[0, text.shape[1] :], out[row, 21:])
    assert_same_states(joined, caches, [0, 0, 0])


def test_a_joined_cache_has_tensors_of_its_own_and_can_be_saved(tmp_path):
    caches = [make_cache(*SETTINGS["h2o by head"]) for _ in range(2)]
    for length, cache in zip((14, 5), caches):
        feed(MODEL, tokens(1, length), cache, prompt=length)
    joined, again = LessCache.join(caches), LessCache.join([LessCache.join(caches[:1]), caches[1]])
    feed(MODEL, tokens(2, 1), joined, prompt=1, positions=torch.tensor([3]))
    assert_same_states(again, caches, [0, 0])
    again.save(tmp_path / "both")
    loaded = LessCache.load(tmp_path / "both", MODEL, KERNELS)
    assert_same_states(loaded, caches, [0, 0])
    assert loaded.lengths.tolist() == [14, 5]


def test_a_mask_that_does_not_fit_the_joined_rows_is_refused():
    caches = [make_cache(*SETTINGS["h2o"]) for _ in range(2)]
    for length, cache in zip((9, 5), caches):
        feed(MODEL, tokens(1, length), cache, prompt=length)
    joined = LessCache.join(caches)
    with pytest.raises(LessError, match=r"contradicts an earlier one about the past, in rows \[1\]"):
        MODEL(tokens(2, 2), attention_mask=torch.ones(2, 11, dtype=torch.long), past_key_values=joined)


def test_what_cannot_be_joined_is_refused_and_says_why():
    fed, other, empty = (make_cache(*SETTINGS[name]) for name in ("h2o", "h2o by head", "h2o"))
    assert empty.lengths.tolist() == []
    kinds = [LessCache.for_model(MODEL, FASTGEN, token_kinds=make_kinds(9)), make_cache(FASTGEN, None, None)]
    for cache in (fed, other, *kinds):
        feed(MODEL, tokens(1, 9), cache, prompt=9)
    twin = make_model()
    elsewhere = LessCache.for_model(twin, H2O(3, 2), KERNELS)
    for caches in ([fed, other], [fed, elsewhere], kinds):
        with pytest.raises(LessError, match="only caches of one model, made with the same policy, kernels and budgets"):
            LessCache.join(caches)
    for caches in ([], [fed, None]):
        with pytest.raises(LessError, match="a list of one or more LessCaches"):
            LessCache.join(caches)
    with pytest.raises(LessError, match="has seen nothing cannot be joined"):
        LessCache.join([fed, empty])
    fed.open = True
    with pytest.raises(LessError, match="was broken off"):
        LessCache.join([fed])
    sliding = tiny("gemma2")
    cache = LessCache.for_model(sliding, H2O(3, 2))
    feed(sliding, tokens(1, 9), cache, prompt=9)
    with pytest.raises(LessError, match="it has layers that are not LESS's"):
        LessCache.join([cache, cache])
    keeper = make_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    cache = LessCache.for_model(keeper, H2O(3, 2))
    feed(keeper, tokens(1, 300), cache, prompt=300)
    with pytest.raises(LessError, match="keeps positions outside the cache"):
        LessCache.join([cache, cache])


def test_states_that_were_not_allocated_alike_are_not_joined():
    def allocate(policy=H2O(3, 2), head_dim=8, **others):
        return LayerState.allocate(policy, batch=2, query_heads=6, kv_heads=3, head_dim=head_dim, **others)

    a, b, kernels = H2O(3, 2), H2O(2, 2), [LayerKernels(6, 3, 8, hidden=4) for _ in range(2)]
    assert len(LayerState.join([allocate(), allocate(), allocate()]).n) == 6
    assert LayerState.join([allocate(kernels=kernels[0]), allocate(kernels=kernels[0])]).parts[0].H.shape == (4, 3, 8, 8)
    for one, other in [
        (allocate(), allocate(b)),
        (allocate(), allocate([a, b, a])),
        (allocate([a, b, b]), allocate([a, a, b])),
        (allocate(), allocate(head_dim=6)),
        (allocate(), allocate(dtype=torch.float64)),
        (allocate(), allocate(movable=True)),
        (allocate(movable=True), allocate()),
        (allocate(), allocate(int8=True)),
        (allocate(), allocate(kernels=kernels[0])),
        (allocate(kernels=kernels[0]), allocate(kernels=kernels[1])),
    ]:
        with pytest.raises(LessError, match="if they were allocated alike"):
            LayerState.join([one, other])
    with pytest.raises(LessError, match="if they were allocated alike"):
        LayerState.join([])

"""LESS in a decoder of one's own, torch alone: python -m less_fast.demo.own_decoder

Where a decoder would append keys and values to its cache and attend, it calls `extend`, with queries and keys rotated.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import gelu, layer_norm

from less_fast import H2O, LayerKernels, LayerState, Policy, extend

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 2, 4, 2, 16, 64, 256


def rotate(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """RoPE: x (N, H, m, D) at position (m,)."""
    angle = position[:, None] * 10_000.0 ** -torch.linspace(0, 1, HEAD_DIM // 2)  # (m, D / 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Decoder:
    """A small transformer with random weights."""

    def __init__(self):
        sizes = dict(q=QUERY_HEADS * HEAD_DIM, k=KV_HEADS * HEAD_DIM, v=KV_HEADS * HEAD_DIM, o=WIDTH, up=4 * WIDTH)
        self.embedding, self.unembedding = torch.randn(2, VOCABULARY, WIDTH)
        self.layers = [{name: torch.randn(WIDTH, size) * WIDTH**-0.5 for name, size in sizes.items()} for _ in range(LAYERS)]

    def __call__(self, ids, start, attentions):
        """ids (N, m), the first at position `start` -> logits (N, m, vocabulary). attentions: of each layer, f(q, k, v)."""
        x, position = self.embedding[ids], torch.arange(start, start + ids.shape[1])
        for weights, attention in zip(self.layers, attentions):
            before = layer_norm(x, [WIDTH])
            q, k, v = ((before @ weights[name]).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for name in "qkv")
            out = attention(rotate(q, position), rotate(k, position), v)  # (N, Hq, m, D)
            x = x + out.transpose(1, 2).flatten(2) @ weights["o"]
            x = x + gelu(layer_norm(x, [WIDTH]) @ weights["up"]) @ weights["up"].T / WIDTH
        return layer_norm(x, [WIDTH]) @ self.unembedding.T


def generate(decoder: Decoder, ids: torch.Tensor, new: int, policy: Policy = H2O(heavy=8, recent=8)) -> Iterator[tuple]:
    """After a prompt ids (N, m) yields `new` tokens (N, 1), the likeliest each time, with the bytes held."""
    kernels = [LayerKernels(QUERY_HEADS, KV_HEADS, HEAD_DIM, hidden=32) for _ in range(LAYERS)]  # untrained: they fold little
    states = [LayerState.allocate(policy, len(ids), QUERY_HEADS, KV_HEADS, HEAD_DIM, features) for features in kernels]
    attentions, seen = [lambda q, k, v, state=state: extend(state, q, k, v) for state in states], 0
    for _ in range(new):
        logits = decoder(ids, seen, attentions)  # the prompt as one chunk, then one token at a time
        seen, ids = seen + ids.shape[1], logits[:, -1:].argmax(-1)
        yield ids, sum(sum(state.memory().values()) for state in states)


if __name__ == "__main__":
    torch.manual_seed(0)
    for token, held in generate(Decoder(), torch.randint(VOCABULARY, (1, 40)), new=100):
        print(f"token {token.item():3}   {held:,} bytes held")

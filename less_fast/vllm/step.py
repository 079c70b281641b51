"""What a step of vLLM's engine holds for LESS: whose tokens these are, and in which page each request's state lies."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor, split_decodes_and_prefills

from ..layer.checks import LessError
from .asked import setting_of
from .pages import ROOM, span_of

SHORT = 256  # tokens of a piece: longer ones gain nothing by entering together


@dataclass
class Prompts:
    """Pieces of prompts that enter together, n of them."""

    tokens: torch.Tensor  # (n, m) int64: which of the step's tokens, the last one again for pads
    valid: torch.Tensor | None  # (n, m) bool: False for pads; None if there are none
    rows: torch.Tensor  # (n,) int64: their pages
    computed: int  # tokens that came before, as many in each


@dataclass
class Step:
    """The first tokens of a step are those of requests that decode, one each; prompts follow."""

    decodes: int  # how many tokens decode
    order: torch.Tensor | None  # (d,) int64: them by page; None if that is their order already
    rows: torch.Tensor  # (d,) int64: their pages, in that order
    real: torch.Tensor | None  # (d,) bool: False for what fills up a CUDA graph; None on CPUs, where nothing does
    span: tuple[int, int] | None  # the first page and the one behind the last, if they lie side by side
    prompts: list[Prompts]


class LessBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "LESS"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("LESS is no implementation of vLLM's Attention")

    @staticmethod
    def get_builder_cls():
        return StepBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the Step, once for all layers whose pages are of one kind. What a CUDA graph reads lies in buffers that stay."""

    reorder_batch_threshold: int | None = 1
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.memories = [layers[name] for name in layer_names]
        self.chunk = setting_of(vllm_config).chunk
        most = vllm_config.scheduler_config.max_num_seqs
        self.rows = torch.zeros(most, dtype=torch.int64, device=device)  # (requests,)
        self.real = torch.zeros(most, dtype=torch.bool, device=device)  # (requests,)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> Step:
        m, mode = common_attn_metadata, self.vllm_config.cache_config.mamba_cache_mode
        table = mamba_get_block_table_tensor(m.block_table_tensor, m.seq_lens, self.kv_cache_spec, mode)
        starts, ends = m.query_start_loc_cpu.tolist(), m.seq_lens_cpu_upper_bound.tolist()
        lengths = [end - start for start, end in pairwise(starts)]
        computed = [end - length for end, length in zip(ends, lengths)]
        decodes = split_decodes_and_prefills(m, decode_threshold=1)[0]
        self._turn_pages(m.block_table_tensor, table, computed, ends)
        new = [i for i in range(decodes) if lengths[i] == 1 and computed[i] == 0]  # prompts of one token
        if new:
            for memory in self.memories:
                memory.reset(table[new, 0].long())
        order, span, real = None, None, None
        rows = self.rows[:decodes]
        rows.copy_(table[:decodes, 0])
        self._make_room(rows, ends[:decodes])
        if self.device.type != "cpu":
            real = self.real[:decodes]
            real.copy_(m.seq_lens[:decodes] > 0)
        elif decodes:
            pages = rows.tolist()
            places = sorted(range(decodes), key=pages.__getitem__)
            if places != list(range(decodes)):
                order = torch.tensor(places)
                rows = rows[order]
            span = span_of([pages[place] for place in places])
        prompts = self._prompts(range(decodes, m.num_reqs), starts, lengths, computed, table)
        return Step(decodes, order, rows, real, span, prompts)

    def _turn_pages(self, pages, table, computed, ends):
        """Where prefixes are cached a page is for the tokens of one piece, and what follows goes on in a copy of it, also if the
        page came from another request."""
        size = self.kv_cache_spec.block_size
        before, now = ([(count - 1) // size for count in counts] for counts in (computed, ends))
        if turning := [i for i, (old, new) in enumerate(zip(before, now)) if -1 < old < new]:
            sources = pages[turning, [before[i] for i in turning]].long()
            for memory in self.memories:
                memory.copy(sources, table[turning, 0].long())

    def _make_room(self, rows, ends):
        """Requests that leave the context with their next token move back, before graphs run that are the same for all."""
        layers = [layer.paged for memory in self.memories for layer in memory.layers[0]]
        context = layers[0].context
        if context is None or not (late := [i for i, end in enumerate(ends) if end > context.length]):
            return
        late = rows[late]
        if len(full := late[layers[0].full(late)]):
            for layer in layers:
                layer.make_room(full)

    def _prompts(self, requests, starts, lengths, computed, table) -> list[Prompts]:
        """Short pieces of nearly equal lengths enter together."""
        if cut := [computed[i] for i in requests if computed[i] % self.chunk]:
            raise LessError(f"vLLM has cut a prompt behind {cut[0]} tokens, and LESS would compute another text from there")
        groups: list[list[int]] = []
        for i in sorted(requests, key=lambda i: (computed[i], lengths[i])):
            group = [*groups[-1], i] if groups else [i]
            tokens, padded = sum(lengths[j] for j in group), len(group) * lengths[i]
            together = computed[group[0]] == computed[i] and lengths[i] <= SHORT and padded <= ROOM * tokens
            groups = [*groups[:-1], group] if together and groups else [*groups, [i]]
        return [self._together(group, starts, lengths, computed[group[0]], table) for group in groups]

    def _together(self, group, starts, lengths, computed, table) -> Prompts:
        first, length = (torch.tensor([of[i] for i in group], device=table.device) for of in (starts, lengths))  # (n,) each
        place = torch.arange(max(lengths[i] for i in group), device=table.device)  # (m,)
        tokens = first[:, None] + place.minimum(length[:, None] - 1)  # (n, m)
        valid = None if lengths[group[0]] == lengths[group[-1]] else place < length[:, None]  # (n, m)
        return Prompts(tokens, valid, table[group, 0].long(), computed)

"""The model "less-kv" for lm-evaluation-harness: any of its tasks, through the full cache, a bare policy, Baseline+ or LESS.

The harness (0.4.13) knows its own models and those that were imported; no entry point of a package tells it of others. So its own
command is run through this file:

    python -m less_fast.measuring.harness run --model less-kv \\
        --model_args pretrained=FOLDER,kernels=FOLDER,budget=5% --tasks boolq --device cpu

and in Python `import less_fast.measuring.harness` comes before `lm_eval.simple_evaluate(model="less-kv", ...)`.
"""

from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedModel

from ..layer.checks import LessError, integer
from ..layer.fastgen import token_kinds
from ..loading import load_config, load_kernels, load_model
from ..setting import best_policy, policy_named, tokens_of
from ..text import beginning
from .compare import contenders
from .reading import Reader

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise ImportError(f"the model of lm-evaluation-harness needs lm_eval ({missing}): pip install 'less-kv[eval]'") from missing


class CachedLM(Reader, TemplateLM):
    """A Reader as a model of the harness."""

    def __init__(self, model: PreTrainedModel, *args, **kwargs):
        TemplateLM.__init__(self)
        Reader.__init__(self, model, *args, **kwargs)
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = True, **kwargs: object) -> list[int]:
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _loglikelihood_tokens(self, requests: Sequence, disable_tqdm: bool = False, **kwargs: object) -> list[tuple[float, bool]]:
        """The scores of requests (texts, context, continuation)."""
        return self.scores([request[1:] for request in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts; what is longer than max_length goes in windows, each through a cache of its own."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        first = tuple(beginning(self.tokenizer)) or (self.prefix_token_id,)
        windows = [
            [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)]
            for ids in texts
        ]
        windows = [[(first, pairs[0][1]), *pairs[1:]] if pairs else [] for pairs in windows]
        scores = iter(self._loglikelihood_tokens([(None, *pair) for pairs in windows for pair in pairs], disable_tqdm))
        return [sum(next(scores)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """What follows each context, until one of its stop sequences: greedy unless the request asks to sample."""
        written = [""] * len(requests)
        wishes = [repr(request.args[1]) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (wishes[index], len(requests[index].args[0])))
        for _, alike in groupby(order, key=wishes.__getitem__):
            for indices in self.batches(list(alike), "texts", disable_tqdm):
                wish = normalize_gen_kwargs(requests[indices[0]].args[1], 256)
                stop = handle_stop_sequences(wish.pop("until"), self.tokenizer.decode([self.eot_token_id]))
                wish["max_new_tokens"] = wish.pop("max_gen_toks")
                if not wish.setdefault("do_sample", False):
                    wish.pop("temperature", None)
                contexts = [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in indices]
                texts = self.generate(contexts, **wish, stop_strings=stop, tokenizer=self.tokenizer)
                for index, text in zip(indices, texts):
                    written[index] = postprocess_generated_text(text, stop, None)
        return written


@register_model("less-kv")
class LessLM(CachedLM):
    """The same for `--model less-kv` of the harness, by what --model_args can say.

    pretrained: folder or hub name of a model; the embedded one if empty. kernels: of kernels for it; those that come with the
    package for this model if empty. cache: full, bare, baseline+ (as many bytes as LESS holds) or less.
    policy: a name of `less_fast.setting.POLICIES`, or best, by `best_policy`. budget: tokens that each KV head keeps (51), or a
    share of max_length (5%). budgets: uniform, or by head, the kernels' table; by default by head where there is one.
    Raises OSError or LessError, with the reason, if these are not there or do not go together.
    """

    def __init__(
        self,
        pretrained: str = "",
        kernels: str = "",
        cache: str = "less",
        policy: str = "best",
        budget: int | str = "5%",
        budgets: str = "",
        dtype: str = "float32",
        device: str = "cpu",
        batch_size: int | str = 8,
        max_length: int = 0,
        max_batch_size: int | None = None,
    ):
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size:
            raise LessError(f"batch_size is a number of requests, not {batch_size!r}: it is not sought automatically")
        context = load_config(pretrained).get_text_config(decoder=True).max_position_embeddings
        max_length = integer("max_length", max_length, 0) or context
        tokens, rule = tokens_of(budget, max_length), None if policy == "best" else policy_named(policy, budget, max_length)
        model, tokenizer = load_model(pretrained, device or "cpu", dtype)
        super().__init__(model, tokenizer, None, 1, int(batch_size), max_length)
        learned = load_kernels(model, kernels)
        rule = rule or best_policy(learned, tokens)
        kinds = token_kinds(tokenizer) if rule.needs == "kinds" else None
        caches = list(contenders(model, [rule], {"": learned} if learned else {}, kinds, by_head=[rule]))
        asked = [one for one in caches if one.cache == cache and (not budgets or one.budgets in (budgets, None))]
        if not asked:
            raise LessError(
                f"there is no cache {cache!r} with budgets {budgets!r} for this policy and these kernels: choose one of "
                f"{', '.join(f'{one.cache} ({one.budgets})' if one.budgets else one.cache for one in caches)}"
            )
        self.make = min(asked, key=lambda one: one.budgets != "by head").make


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

"""Classification through lm-evaluation-harness: its model "less-kv", and a task made of the held-out text.

    python -m paper_checks harness --tasks boolq,mutual    # tasks of the harness, where their data can be had

Importing this file registers the model, for `lm_eval.simple_evaluate` and for the harness's own command:

    python -c "import paper_checks.harness; from lm_eval.__main__ import cli_evaluate; cli_evaluate()" run \\
        --model less-kv --model_args pretrained=FOLDER,kernels=FOLDER,cache=less,policy=h2o,budget=5% --tasks boolq --device cpu
"""

import random
import re
from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from less_fast import LessKernels, token_kinds
from less_fast.demo import KERNELS, MODEL
from less_fast.hf.architecture import check_kernels
from less_fast.measuring.compare import contenders
from less_fast.setting import POLICIES

from .check import Found, Setting, verdict

CLAIM = "Classification through lm-evaluation-harness: LESS above Baseline+"
PAPER = "LESS above Baseline+"
NAME = re.compile(r"[^\W\d]\w{4,}")  # a word of at least five characters
CHOICE = 24  # characters of an answer: a name and what follows it
QUESTIONS = 200
ROWS = 256  # requests in one forward pass


class CachedLM(TemplateLM):
    """A model of the harness that reads and writes through the caches that `make` gives: make(chunk), an empty one.

    chunk: how a text enters: 1 for streaming, through the decode path alone; None for prompts in one piece.
    batch_size: requests in one forward pass, padded.
    max_length: tokens of a request, as many as the model takes unless given; what is longer loses its beginning.
    """

    def __init__(self, model, tokenizer, make: Callable, chunk: int | None = 1, batch_size: int = ROWS, max_length: int = 0):
        super().__init__()
        self.model, self.tokenizer, self.make, self.chunk, self.batch_size = model, tokenizer, make, chunk, batch_size
        self.max_length = max_length or model.config.get_text_config(decoder=True).max_position_embeddings
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = True, **kwargs) -> list[int]:
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs) -> list[tuple[float, bool]]:
        """For each request (texts, context, continuation): nats, and whether greedy decoding would say the continuation."""
        found = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: (len(requests[index][1]), requests[index][1]))
        for indices in self._batches(order, "log-likelihoods", disable_tqdm):
            pairs = [self._fitting(*requests[index][1:]) for index in indices]
            for index, score in zip(indices, self._scores(pairs)):
                found[index] = score
        return found

    def _fitting(self, context, continuation):
        """The pair with as much of the context as there is room for; the last token need not be read."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens does not fit into max_length={self.max_length}")
        return tuple(context[-room:]), continuation

    def _scores(self, pairs) -> Iterator[tuple[float, bool]]:
        """The same for one batch. Continuations (R, M) of one context share its pass: there are N <= R contexts."""
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        rows = torch.tensor([contexts.index(context) for context, _ in pairs], device=self.device)  # (R,)
        cache = self.make(self.chunk)
        ids, mask = self._padded(contexts)  # (N, C)
        logits = self._read(cache, ids, mask, logits_to_keep=1)[rows]  # (R, 1, vocabulary)
        ids, new = self._padded([continuation for _, continuation in pairs], left=False)  # (R, M)
        if ids.shape[1] > 1:
            cache.reorder_cache(rows)
            rest = self._read(cache, ids[:, :-1], torch.cat([mask[rows], new[:, :-1]], 1))
            logits = torch.cat([logits, rest], 1)  # (R, M, vocabulary)
        nats = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0] * new  # (R, M)
        greedy = (logits.argmax(-1) == ids) | (new == 0)  # (R, M)
        return zip(nats.double().sum(1).tolist(), greedy.all(1).tolist())

    def _read(self, cache, ids, mask, **kwargs):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **kwargs
        ).logits

    def _padded(self, rows, left=True):
        """Token ids (N, T) of rows of tokens, and the mask that is 0 at pads."""
        longest = max(map(len, rows))
        pads = [[0] * (longest - len(row)) for row in rows]
        ids = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads)]
        mask = [[*pad, *[1] * len(row)] if left else [*[1] * len(row), *pad] for row, pad in zip(rows, pads)]
        return torch.tensor([ids, mask], device=self.device)

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Nats of whole texts; what is longer than max_length goes in windows, each through a cache of its own."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        windows = [
            [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)]
            for ids in texts
        ]
        scores = iter(self._loglikelihood_tokens([(None, *pair) for pairs in windows for pair in pairs], disable_tqdm))
        return [sum(next(scores)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """What follows each context, until one of its stop sequences: greedy unless the request asks to sample."""
        found = [""] * len(requests)
        wishes = [repr(request.args[1]) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (wishes[index], len(requests[index].args[0])))
        for _, alike in groupby(order, key=wishes.__getitem__):
            for indices in self._batches(list(alike), "texts", disable_tqdm):
                wish = normalize_gen_kwargs(requests[indices[0]].args[1], 256)
                stop = handle_stop_sequences(wish.pop("until"), self.tokenizer.decode([self.eot_token_id]))
                wish["max_new_tokens"] = wish.pop("max_gen_toks")
                if not wish.setdefault("do_sample", False):
                    wish.pop("temperature", None)
                contexts = [self.tok_encode(requests[index].args[0]) for index in indices]
                texts = self.generate(contexts, **wish, stop_strings=stop, tokenizer=self.tokenizer)
                for index, text in zip(indices, texts):
                    found[index] = postprocess_generated_text(text, stop, None)
        return found

    @torch.inference_mode()
    def generate(self, contexts: list[list[int]], max_new_tokens: int, **kwargs) -> list[str]:
        """What the model writes after each context of tokens; kwargs go to `model.generate`."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ValueError(f"{max_new_tokens} new tokens leave no room for a context in max_length={self.max_length}")
        ids, mask = self._padded([context[-room:] for context in contexts])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.make(self.chunk),
            max_new_tokens=max_new_tokens,
            pad_token_id=self.eot_token_id,
            **kwargs,
        )
        return self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)

    def _batches(self, indices, what, disable_tqdm):
        for start in tqdm(range(0, len(indices), self.batch_size), what, disable=disable_tqdm):
            yield indices[start : start + self.batch_size]


@register_model("less-kv")
class LessLM(CachedLM):
    """The same for `--model less-kv` of the harness, by what --model_args can say.

    pretrained: folder or hub name of a model; the embedded one unless given. kernels: of kernels for it; embedded model: its own.
    cache: full, bare, baseline+ (as many bytes as LESS holds) or less. policy: a name of `less_fast.policies.POLICIES`.
    budget: tokens that each KV head keeps (51), or a share of max_length (5%). budgets: uniform, or by head, the kernels' table.
    Raises ValueError, with the reason, where these do not go together.
    """

    def __init__(
        self,
        pretrained: str = str(MODEL),
        kernels: str | None = None,
        cache: str = "less",
        policy: str = "h2o",
        budget: int | str = "5%",
        budgets: str = "uniform",
        dtype: str = "float32",
        device: str = "cpu",
        batch_size: int | str = 8,
        max_length: int = 0,
        max_batch_size: int | None = None,
    ):
        if policy not in POLICIES:
            raise ValueError(f"no policy is called {policy!r}; these are: {', '.join(POLICIES)}")
        if not str(batch_size).isdecimal() or max_batch_size:
            raise ValueError(f"batch_size is a number of requests, not {batch_size!r}: it is not sought automatically")
        kernels = kernels or (str(KERNELS) if pretrained == str(MODEL) else None)
        model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=getattr(torch, dtype)).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(pretrained)
        learned = LessKernels.from_pretrained(kernels).to(device) if kernels else None
        if learned:
            check_kernels(model, learned)
        super().__init__(model, tokenizer, None, batch_size=int(batch_size), max_length=int(max_length))
        rule, share = POLICIES[policy], re.fullmatch(r"(\d+(?:\.\d+)?)%", str(budget))
        if not share and not str(budget).isdecimal():
            raise ValueError(f"a budget is a number of tokens (51) or a share of max_length (5%), not {budget!r}")
        if rule.budget is not None:
            rule = rule.with_budget(int(float(share[1]) / 100 * self.max_length) if share else int(budget))
        kinds = token_kinds(tokenizer) if rule.kinds else None
        caches = contenders(model, [rule], {"": learned} if learned else {}, kinds)
        known = {(one.cache, one.budgets or budgets): one.make for one in caches}
        if (cache, budgets) not in known:
            raise ValueError(
                f"there is no cache {cache!r} with budgets {budgets!r} for this policy and these kernels; there are: "
                f"{', '.join(f'{kind} ({spread})' for kind, spread in known)}"
            )
        self.make = known[cache, budgets]


def far_names(setting: Setting) -> dict:
    """A task whose answers lie far back: which of four names comes next, in held-out text.

    The right one stood in the first half of the context last. The others follow the same character elsewhere in the same text,
    outside the context, and do not occur in it. Answers have CHOICE characters, a context 1.5 for each token of a window.
    """
    texts, length, rng = setting.held_out(), 3 * setting.length // 2, random.Random(setting.seed)
    names = [[(match.start(), match.group()) for match in NAME.finditer(text)] for text in texts]
    places = [(text, place) for text, found in enumerate(names) for place in found if place[0] >= length]
    rng.shuffle(places)
    questions, wanted = [], 32 if setting.quick else QUESTIONS
    for index, (start, name) in places:
        text, context = texts[index], texts[index][start - length : start]
        if not 0 <= context.rfind(name) < length // 2 or start + CHOICE > len(text):
            continue
        others = {
            other: at
            for at, other in names[index]
            if at and text[at - 1] == text[start - 1] and other not in context and other != name
            if at + CHOICE <= start - length or start + CHOICE <= at <= len(text) - CHOICE
        }
        if len(others) < 3:
            continue
        choices = [start, *rng.sample(sorted(others.values()), 3)]
        order = rng.sample(range(4), 4)
        choices = [text[choices[which]:][:CHOICE] for which in order]
        questions.append({"context": context, "choices": choices, "answer": order.index(0)})
        if len(questions) == wanted:
            break
    if len(questions) < 2:
        raise ValueError("the text has no names that come again from far back: give more text, or tasks of the harness (--tasks)")
    return {
        "task": "far_names",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(questions)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def load_tasks(names: list[str]) -> list:
    """Tasks of the harness with their data, by name or YAML file. ValueError where there is none, no data, or no choice."""
    try:
        tasks = list(TaskManager().load(names)["tasks"].values())
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"the harness cannot load {', '.join(names)}: {error}") from error
    for task in tasks:
        if task.OUTPUT_TYPE != "multiple_choice":
            raise ValueError(f"the task {task.task_name} is no multiple choice but {task.OUTPUT_TYPE}: name others")
    return tasks


def evaluated(lm: CachedLM, tasks: list, limit: int | None = None) -> dict[str, torch.Tensor]:
    """By task, what the harness gives each document, (documents,) float64: the first metric of which more is better."""
    results = simple_evaluate(lm, tasks=tasks, limit=limit, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))
    found = {}
    for task, samples in results["samples"].items():
        metric = next(name for name, better in results["higher_is_better"][task].items() if better)
        values = {sample["doc_id"]: sample[metric] for sample in samples}  # once, whatever filters there are
        found[task] = torch.tensor([values[document] for document in sorted(values)], dtype=torch.float64)
    return found


def mean(values: torch.Tensor) -> tuple[float, float]:
    """The mean of values (documents,) and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def check(setting: Setting) -> Found:
    """Streaming, uniform budgets. Differences are paired: all caches answer the same questions."""
    tasks = setting.tasks or [far_names(setting)]
    found, lines, parts, figures, gains = {}, [], [], {}, []
    for one in contenders(setting.model, setting.policies(), {"ours": setting.kernels}):
        if one.budgets == "by head":
            continue
        lm = CachedLM(setting.model, setting.tokenizer, one.make, max_length=setting.length)
        answers = evaluated(lm, tasks, 2 if setting.quick and setting.tasks else None)
        found[one.cache] = answers
        for name, values in answers.items():
            (share, stderr), kept = mean(values), one.policy.budget if one.policy else "all"
            line = [name, one.cache, str(kept), f"{share:.1%} ± {stderr:.1%}", ""]
            figures[f"{name}, {one.cache}, {kept}"] = {"mean": share, "stderr": stderr, "documents": len(values)}
            if one.cache == "less":
                over = {other: mean(values - found[other][name]) for other in ("bare", "baseline+")}
                parts.append(over["bare"][0] > 0 and over["baseline+"][0] >= 0)
                figures[f"{name}, less, {kept}"]["over"] = over
                line[-1] = "{:+.1%} ± {:.1%}".format(*over["baseline+"])
                gains.append(f"{line[-1]} ({name}, {kept} tokens)")
            lines.append(line)
    documents = sum(map(len, found["full"].values()))
    sentence = (
        f"of {documents} questions the full cache answers {lines[0][3]} ({lines[0][0]}); LESS minus Baseline+: {', '.join(gains)}"
    )
    return Found(verdict(parts), sentence, figures, ["task", "cache", "tokens kept", "right", "over Baseline+"], lines)

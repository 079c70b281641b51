"""Classification through lm-evaluation-harness: LESS against Baseline+ on a task made of the held-out text.

    python -m paper_checks harness --tasks boolq,mutual    # tasks of the harness, where their data can be had

The model "less-kv" that the harness runs is in `less_fast/measuring/harness.py`.
"""

import random
import re

import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from less_fast import LessError
from less_fast.measuring.compare import contenders
from less_fast.measuring.harness import CachedLM

from .check import Finding, Subject, claim, verdict
from .script import mean

NAME = re.compile(r"[^\W\d]\w{4,}")  # a word of at least five characters
CHOICE = 24  # characters of an answer: a name and what follows it
QUESTIONS = 200
RECALL = {"r@1": 1, "r@2": 1 / 2}
"""MuTual's, by the least reciprocal rank of a right answer. lm_eval 0.4.13's own `r@1` and `r@2` are wrong: its argmax takes the
(score, greedy) pairs for one row of numbers, and finds the first flag. Its `mrr` is right."""


def far_names(subject: Subject) -> dict:
    """A task whose answers lie far back: which of four names comes next, in held-out text.

    The right one stood in the first half of the context last. The others follow the same character elsewhere in the same text,
    outside the context, and do not occur in it. Answers have CHOICE characters, a context 1.5 for each token of a window.
    """
    texts, length, rng = subject.held_out(), 3 * subject.length // 2, random.Random(subject.seed)
    names = [[(match.start(), match.group()) for match in NAME.finditer(text)] for text in texts]
    places = [(text, place) for text, of_text in enumerate(names) for place in of_text if place[0] >= length]
    rng.shuffle(places)
    questions, wanted = [], 32 if subject.quick else QUESTIONS
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
        choices = [text[choices[which] :][:CHOICE] for which in order]
        questions.append({"context": context, "choices": choices, "answer": order.index(0)})
        if len(questions) == wanted:
            break
    if len(questions) < 2:
        raise LessError("the text has no names that come again from far back: give more text, or tasks of the harness (--tasks)")
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


class Noted(CachedLM):
    """A model that computes nothing: `asked` holds the pairs of tokens that the harness asked it for, in `answers` are scores.

    With the scores of a Reader for what was asked, measured anywhere, the harness makes its own metrics of them.
    """

    def __init__(self, tokenizer: object, max_length: int, answers: dict | None = None):
        TemplateLM.__init__(self)
        self.tokenizer, self.max_length, self.answers, self.asked = tokenizer, max_length, answers or {}, []

    def scores(self, pairs, disable_tqdm=False):
        """LessError if there are answers, and none to one of the pairs."""
        self.asked = [self.fitting(*pair) for pair in pairs]
        if self.answers and not {*self.asked} <= {*self.answers}:
            raise LessError("the harness asks what was not measured: prepare and measure again, with the same tasks and versions")
        return [self.answers.get(pair, (0.0, False)) for pair in self.asked]


def load_tasks(names: list[str]) -> list:
    """Tasks of the harness with their data, by name or YAML file. LessError if there is none, no data, or it wants texts."""
    try:
        tasks = list(TaskManager().load(names)["tasks"].values())
    except (KeyError, OSError, ValueError) as error:
        raise LessError(f"the harness cannot load {', '.join(names)}: {error}") from error
    for task in tasks:
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            raise LessError(f"the task {task.task_name} is no multiple choice or cloze but {task.OUTPUT_TYPE}: name others")
    return tasks


def metrics(lm: CachedLM, tasks: list, **which: object) -> dict[str, dict[str, torch.Tensor]]:
    """By task and metric, those first of which more is better, what the harness gives each document, (documents,) float64.

    which: documents, as `simple_evaluate` takes them (limit, samples).
    """
    few = TaskManager(include_defaults=False)
    results = simple_evaluate(lm, tasks=tasks, bootstrap_iters=0, task_manager=few, **which)
    values: dict = {}
    for task, samples in results["samples"].items():
        better = results["higher_is_better"][task]
        for metric in sorted(better, key=lambda name: not better[name]):
            once = {sample["doc_id"]: sample[metric] for sample in samples}  # whatever filters there are
            values.setdefault(task, {})[metric] = torch.tensor([once[index] for index in sorted(once)], dtype=torch.float64)
    for of_task in values.values():
        of_task |= {name: (of_task["mrr"] >= least).double() for name, least in RECALL.items() if {name, "mrr"} <= of_task.keys()}
    return values


@claim("Classification through lm-evaluation-harness: LESS above Baseline+", "LESS above Baseline+ (table 3)")
def harness(subject: Subject) -> Finding:
    """Streaming, uniform budgets. Differences are paired: all caches answer the same questions."""
    tasks = subject.tasks or [far_names(subject)]
    scores, lines, parts, figures, gains = {}, [], [], {}, []
    for contender in contenders(subject.model, subject.policies(), {"ours": subject.kernels}):
        if contender.budgets == "by head":
            continue
        lm = CachedLM(subject.model, subject.tokenizer, contender.make, max_length=subject.length)
        told = metrics(lm, tasks, limit=2 if subject.quick and subject.tasks else None)
        answers = {task: next(iter(values.values())) for task, values in told.items()}  # the first metric
        scores[contender.cache] = answers
        for name, values in answers.items():
            (share, stderr), kept = mean(values), contender.policy.budget if contender.policy else "all"
            line = [name, contender.cache, str(kept), f"{share:.1%} ± {stderr:.1%}", ""]
            figures[f"{name}, {contender.cache}, {kept}"] = {"mean": share, "stderr": stderr, "documents": len(values)}
            if contender.cache == "less":
                over = {other: mean(values - scores[other][name]) for other in ("bare", "baseline+")}
                parts.append(over["bare"][0] > 0 and over["baseline+"][0] >= 0)
                figures[f"{name}, less, {kept}"]["over"] = over
                line[-1] = "{:+.1%} ± {:.1%}".format(*over["baseline+"])
                gains.append(f"{line[-1]} ({name}, {kept} tokens)")
            lines.append(line)
    documents = sum(map(len, scores["full"].values()))
    sentence = (
        f"of {documents} questions the full cache answers {lines[0][3]} ({lines[0][0]}); LESS minus Baseline+: {', '.join(gains)}"
    )
    return Finding(verdict(parts), sentence, figures, ["task", "cache", "tokens kept", "right", "over Baseline+"], lines)

"""Summarisation (tables 4, 5): ROUGE of what a compressed cache writes, and the share of the loss that LESS recovers.

    python -m paper_checks summarization --model FOLDER --kernels FOLDER --summaries cnn_dailymail,3.0.0,test,article,highlights

Against the data set's own summaries there. Without --summaries against what the full cache itself writes after the same prompt:
held-out text goes on. Prompts enter in one piece, as with `model.generate`; the text after them is greedy.
"""

import torch
from rouge_score.rouge_scorer import RougeScorer

from less_fast.measuring.compare import contenders, share_recovered
from less_fast.measuring.reading import Reader

from . import script
from .check import Finding, Subject, claim, verdict

KINDS = ("rouge1", "rouge2", "rougeL")
PROMPT = "Article: {}\n\nSummary:"  # ours
REQUEST = "Summarize the following article in a few sentences.\n\n{}"  # ours, for a model with a chat template
TEXTS = 64
NEW = 128  # tokens that are written at most, or an eighth of a window
ROWS = 64  # texts in one forward pass


def prompts(subject: Subject, new: int) -> list[list[int]]:
    """Tokens of each prompt, with room for the new ones in a window. A long article loses its end."""
    if subject.summaries is None:
        return subject.windows(TEXTS)[:, :-new].tolist()
    return [prompt(subject.tokenizer, article, subject.length - new) for article, _ in subject.summaries]


def prompt(tokenizer, article: str, room: int) -> list[int]:
    """Tokens, at most `room` of them, that ask for a summary: by the chat template of the tokenizer if it has one."""

    def framed(text):
        if not tokenizer.chat_template:
            return tokenizer(PROMPT.format(text))["input_ids"]
        return tokenizer(script.answer_to(tokenizer, REQUEST.format(text)), add_special_tokens=False)["input_ids"]

    ids = tokenizer(article, add_special_tokens=False, verbose=False)["input_ids"][: room - len(framed(""))]
    while len(asked := framed(tokenizer.decode(ids))) > room and ids:  # what is cut may take more tokens than it was
        ids = ids[: room - len(asked)]
    return asked


def rouge(references: list[str], texts: list[str]) -> torch.Tensor:
    """F-measures of KINDS, without stemming: (texts, kinds) float64."""
    scorer = RougeScorer(KINDS)
    scores = [scorer.score(reference, text) for reference, text in zip(references, texts)]
    return torch.tensor([[score[kind].fmeasure for kind in KINDS] for score in scores], dtype=torch.float64)


@claim(
    "Summarisation: LESS above the bare policy and above Baseline+, by ROUGE",
    "Falcon 7B, 10 % H2O: 41.4 % of the Rouge-1 loss recovered",
)
def summarization(subject: Subject) -> Finding:
    new = min(NEW, subject.length // 8)
    contexts = prompts(subject, new)
    references = subject.summaries and [summary for _, summary in subject.summaries]
    scores, parts, lines, figures, shares = {}, [], [], {}, []
    for contender in contenders(subject.model, subject.policies(), subject.families()):
        lm = Reader(subject.model, subject.tokenizer, contender.make, None, ROWS, subject.length)
        texts = lm.answers(contexts, new)
        references = references or texts  # of the full cache, which comes first
        scores[contender.cache, contender.budgets, contender.policy] = score = rouge(references, texts)
        kept, spread = contender.policy.budget if contender.policy else "all", contender.budgets or ""
        name = ", ".join(filter(None, (contender.cache, contender.kernels)))
        line = [name, str(kept), spread, *(f"{mean:.3f}" for mean in score.mean(0).tolist()), ""]
        figures[f"{name}, {kept}, {spread}"] = measured = {"rouge": dict(zip(KINDS, score.mean(0).tolist()))}
        if contender.cache in ("bare", "full"):
            scores[contender.cache] = score
        elif scores["bare"][:, 0].mean() < scores["full"][:, 0].mean():
            share, stderr = share_recovered(*(x[:, 0] for x in (scores["full"], scores["bare"], score)), of=torch.Tensor.clone)
            line[-1] = f"{share:.1%} ± {stderr:.1%}"
            measured["recovered"] = share, stderr
        if contender.cache == "less":
            others = scores["bare"], scores["baseline+", contender.budgets, contender.plus]
            parts.append(all((score.mean(0) > other.mean(0)).all().item() for other in others))
            shares.append(f"{line[-1]} at {kept} tokens ({contender.kernels}, {spread})")
        lines.append(line)
    sentence = (
        f"over {len(contexts)} texts LESS has the higher Rouge-1, 2 and L in {sum(parts)} of {len(parts)} cells, and of the "
        f"Rouge-1 loss recovers {', '.join(shares)}"
    )
    headings = ["cache", "tokens kept", "budgets", "Rouge-1", "Rouge-2", "Rouge-L", "Rouge-1 loss recovered"]
    return Finding(verdict(parts), sentence, figures, headings, lines)

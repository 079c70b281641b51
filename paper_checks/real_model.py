"""The paper's tables on a real model: perplexity, classification, summaries, answers and retrieval, through every cache.

In three parts, so that the model can be measured where there are no data sets, no network, and little time:

    python -m paper_checks.real_model prepare inputs.json --model smollm2 --text pg19=emozilla/pg19-test,,test ...
    python -m paper_checks.real_model measure inputs.json measured.json --model smollm2 --device cuda
    python -m paper_checks.real_model report inputs.json measured.json paper_checks/results/real_model.json

`prepare` and `report` need lm_eval, datasets and rouge_score; `measure` does not. Texts and data sets are files or
NAME[,CONFIG[,SPLIT[,COLUMN]]], or `library`: held-out modules of Python's. Tasks are the harness's own or YAML files. `measure`
writes after each cache, and goes on where it was stopped. REAL_MODELS.md has the commands in full.
"""

import argparse
import hashlib
import json
import random
import re
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from less_fast import LessError
from less_fast.files import digest, write_text
from less_fast.layer.fastgen import token_kinds
from less_fast.loading import load_kernels, load_model, load_tokenizer
from less_fast.measuring import versions
from less_fast.measuring.compare import Contender, contenders, share_recovered, token_losses
from less_fast.measuring.reading import Reader
from less_fast.setting import policy_named
from less_fast.text import dataset_columns, windows

from . import answers as answering
from . import script
from .__main__ import texts_of
from .script import mean

EIGHTHS = 8  # parts of a window whose loss is written down
NEW = 64  # tokens of a summary
ROWS = 1000  # of a data set, among which summaries are drawn
NAMES = "part", "dtype", "rule", "cache", "budgets", "context"  # that tell records apart, beside kernels and inputs


def prepare(chosen) -> None:
    tokenizer = load_tokenizer(chosen.model)
    inputs: dict = {"about": {name: getattr(chosen, name) for name in ("model", "tasks", "questions", "length", "seed")}}
    for part, length, count in (("text", chosen.length, chosen.windows), ("long", chosen.long_length, chosen.long_windows)):
        texts = {}
        for name, where in getattr(chosen, part):
            texts.setdefault(name, []).extend(texts_of(where, length))
        for name, own in texts.items():
            inputs.setdefault(part, {})[name] = {"ids": windows(tokenizer, own, length, count, chosen.seed).tolist()}
    if chosen.tasks:
        from .harness import Noted, load_tasks, metrics

        noted, tasks = Noted(tokenizer, chosen.length), load_tasks(chosen.tasks.split(","))
        metrics(noted, tasks, samples=drawn(tasks, inputs["about"]))
        inputs["tasks"] = packed(list(dict.fromkeys(noted.asked)))
    for name, where in chosen.summaries:
        from .summarization import prompt

        rows = list(islice(dataset_columns(*where.split(",")), ROWS))
        rows = random.Random(chosen.seed).sample(rows, min(chosen.texts, len(rows)))
        prompts = [prompt(tokenizer, article, chosen.length - NEW) for article, _ in rows]
        inputs.setdefault("summaries", {})[name] = {"prompts": prompts, "references": [summary for _, summary in rows]}
    for name, where in chosen.answers:
        rows = answering.rows_of(Path(where))
        rows = random.Random(chosen.seed).sample(rows, min(chosen.questions, len(rows)))
        questions, told = zip(*(answering.asked(name, row) for row in rows))
        inputs.setdefault("answers", {})[name] = {"prompts": answering.prompts(tokenizer, questions), "told": told}
    if "text" in inputs:
        rows = next(reversed(inputs["text"].values()))["ids"]
        inputs["retrieval"] = retrieval(tokenizer, rows, chosen.length, chosen.numbers, chosen.seed)
    write(chosen.inputs, inputs)


def retrieval(tokenizer, rows: list[list[int]], length: int, numbers: int, seed: int) -> dict:
    """Numbers that are told once and asked for at the end, so many of each kind: one within a text, and one of many, by its key.

    rows: windows of a text, of which the haystacks and the keys are.
    """
    rng, texts = random.Random(seed), tokenizer.batch_decode(rows)
    words = sorted(set(re.findall(r"\b[a-z]{5,9}\b", " ".join(texts))))
    asked, names, pairs = [], [], []
    for tokens in (length // 8, length // 4, length // 2, 3 * length // 4):
        for _ in range(numbers):
            number, sentences = f"555-{rng.randrange(1000, 10_000)}", tokenizer.decode(rng.choice(rows)[:tokens]).split(". ")
            sentences.insert(rng.randrange(len(sentences)), f"My phone number is {number}")
            question, begun = ". ".join(sentences) + "\n\nWhat is my phone number?", "Your phone number is"
            asked.append((f"needle in {tokens} tokens", question, begun, number))
    for count in (count for count in (5, 10, 20, 40) if count <= len(words)):
        for _ in range(numbers):
            codes = {key: str(rng.randrange(1000, 10_000)) for key in rng.sample(words, count)}
            told, key = [f"The code of the {key} is {code}." for key, code in codes.items()], rng.choice(list(codes))
            question, begun = "\n".join([*told, f"\nWhat is the code of the {key}?"]), f"The code of the {key} is"
            asked.append((f"one of {count} codes", question, begun, codes[key]))
    for name, question, begun, answer in asked:
        context = script.answer_to(tokenizer, question) + begun
        ids, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, f"{context} {answer}"))
        names.append(name)
        pairs.append((tuple(ids), tuple(whole[len(ids) :])))
    return {"names": names} | packed(pairs)


def drawn(tasks: list, about: dict) -> dict[str, list[int]]:
    """The documents of each task: so many, drawn once."""
    sizes = {task.task_name: len(task.eval_docs) for task in tasks}
    return {
        name: sorted(random.Random(about["seed"]).sample(range(size), min(size, about["questions"])))
        for name, size in sizes.items()
    }


def packed(pairs: list[tuple]) -> dict:
    """Pairs (context, continuation), with each context once."""
    contexts = {context: row for row, context in enumerate(dict.fromkeys(context for context, _ in pairs))}
    return {"contexts": list(contexts), "pairs": [[contexts[context], said] for context, said in pairs]}


def unpacked(part: dict) -> list[tuple]:
    return [(tuple(part["contexts"][row]), tuple(said)) for row, said in part["pairs"]]


def write(file: Path, content: dict) -> None:
    write_text(file, json.dumps(content) + "\n")


def perplexity(reader: Reader, contender: Contender, texts: dict) -> dict:
    """Nats of each eighth of each window, by text; all texts of a length go through together."""
    ids = torch.tensor([row for text in texts.values() for row in text["ids"]])  # (W, T)
    losses = token_losses(reader.model, ids, contender, reader.batch_size).double()  # (W, T - 1)
    sums = torch.stack([part.sum(1) for part in losses.tensor_split(EIGHTHS, 1)], 1)  # (W, EIGHTHS)
    counts = [len(text["ids"]) for text in texts.values()]
    return {name: rows.tolist() for name, rows in zip(texts, sums.split(counts))}


def scores(reader: Reader, contender: Contender, pairs: dict) -> list[tuple[float, bool]]:
    """(nats, greedy) of each pair."""
    return reader.scores(unpacked(pairs), disable_tqdm=True)


def summaries(reader: Reader, contender: Contender, texts: dict) -> dict[str, list[str]]:
    """What is written after each prompt, by data set."""
    return {name: reader.answers(text["prompts"], NEW) for name, text in texts.items()}


def answers(reader: Reader, contender: Contender, texts: dict) -> dict[str, list[str]]:
    """What is answered to each question, by data set."""
    return {name: reader.answers(text["prompts"], answering.NEW[name]) for name, text in texts.items()}


PARTS: dict[str, tuple[str, Callable, int | None]] = {
    "perplexity": ("text", perplexity, 1),
    "tasks": ("tasks", scores, None),
    "tasks streaming": ("tasks", scores, 1),
    "summaries": ("summaries", summaries, None),
    "answers": ("answers", answers, None),
    "retrieval streaming": ("retrieval", scores, 1),
    "long": ("long", perplexity, 1),
}
"""What is read of the inputs, by what, and how a text enters (`chunk`)."""
CACHES = "full", "bare", "baseline+", "baseline+ uniform", "baseline+ by head", "less", "less uniform", "less by head"


def measure(chosen) -> None:
    inputs, done = json.loads(chosen.inputs.read_text(encoding="utf-8")), {"results": []}
    if chosen.results.exists():
        done = json.loads(chosen.results.read_text(encoding="utf-8"))
    model, tokenizer = load_model(chosen.model, chosen.device, chosen.dtype)
    kernels = load_kernels(model, chosen.kernels)
    if kernels is None:
        raise LessError("the caches are about kernels: say which with --kernels")
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    kinds, length = token_kinds(tokenizer), inputs["about"]["length"]
    own = digest(kernels.state_dict(), json.dumps({name: vars(curves) for name, curves in kernels.curves.items()}))
    parts = chosen.parts.split(",") if chosen.parts else [part for part in PARTS if PARTS[part][0] in inputs]
    if absent := [part for part in parts if PARTS.get(part, [part])[0] not in inputs]:
        raise LessError(f"nothing in {chosen.inputs} is for the part {absent[0]!r}: choose some of {', '.join(PARTS)}")
    asked = chosen.caches.split(",") if chosen.caches else []
    script.known("cache", asked, CACHES)
    for part in parts:
        what, measured, chunk = PARTS[part]
        limits = {"answers": answering.NEW, "summaries": NEW}.get(what)  # of what is written
        read = hashlib.sha256(json.dumps([inputs[what], limits]).encode()).hexdigest()
        if any(record["part"] == part and record.get("inputs") != read for record in done["results"]):
            raise LessError(f"{chosen.results} has figures of {part} from other inputs: give another file for these")
        rules = [policy_named(name, kept, length) for kept in chosen.budgets.split(",") for name in chosen.policies.split(",")]
        for rule in rules:
            for contender in contenders(model, [rule], {"": kernels}, kinds, context=chosen.context):
                label = {"part": part, "dtype": chosen.dtype, "rule": None if contender.cache == "full" else repr(rule)}
                label |= {"cache": contender.cache, "budgets": contender.budgets}
                label |= {"context": None if contender.cache == "full" else chosen.context, "inputs": read}
                label |= {"kernels": None if contender.cache == "full" else own}
                there = any(label.items() <= record.items() for record in done["results"])
                names = {contender.cache, f"{contender.cache} {contender.budgets}"}
                if there or (asked and names.isdisjoint(asked)):
                    continue
                start = time.perf_counter()
                reader = Reader(model, tokenizer, contender.make, chunk, chosen.batch, length)
                label["values"] = measured(reader, contender, inputs[what])
                label |= {"kept": contender.policy and contender.policy.budget, "seconds": round(time.perf_counter() - start, 1)}
                done["results"].append(label | {"device": device, "versions": versions()})
                write(chosen.results, done)
                print(f"{part}: {contender.cache} {contender.budgets or ''} {rule}: {label['seconds']} s", flush=True)


def columns(part: str, inputs: dict, record: dict, tasks: list) -> dict[str, torch.Tensor]:
    """By column the values of a record, for each window, document or text, (n,) float64: nats where the name says perplexity."""
    what, values = PARTS[part][0], record["values"]
    if what in ("text", "long"):
        sums = {name: torch.tensor(rows, dtype=torch.float64).sum(1) for name, rows in values.items()}  # (W,)
        return {f"{name}, perplexity": nats / (len(inputs[what][name]["ids"][0]) - 1) for name, nats in sums.items()}
    if what == "summaries":
        from .summarization import KINDS, rouge

        found = {name: rouge(inputs[what][name]["references"], texts) for name, texts in values.items()}  # (texts, kinds)
        return {f"{name}, {kind}": own[:, index] for name, own in found.items() for index, kind in enumerate(KINDS)}
    if what == "answers":
        both = {name: zip(texts, inputs[what][name]["told"], strict=True) for name, texts in values.items()}
        rights = {name: [answering.right(name, *pair) for pair in pairs] for name, pairs in both.items()}
        return {name: torch.tensor(own, dtype=torch.float64) for name, own in rights.items()}
    if what == "retrieval":
        right, names = torch.tensor([greedy for _, greedy in values], dtype=torch.float64), inputs[what]["names"]  # (pairs,)
        return {name: right[[other == name for other in names]] for name in dict.fromkeys(names)}
    from .harness import Noted, metrics

    answers = {pair: tuple(score) for pair, score in zip(unpacked(inputs[what]), values)}
    noted = Noted(load_tokenizer(inputs["about"]["model"]), inputs["about"]["length"], answers)
    found = metrics(noted, tasks, samples=drawn(tasks, inputs["about"]))
    signs = {"perplexity": -1}  # the harness counts log-likelihoods
    return {f"{task}, {name}": signs.get(name, 1) * x for task, own in found.items() for name, x in own.items()}


def figure(name: str, own: torch.Tensor, full, gap, bare, plus) -> dict:
    """The value of a column with its error; paired: what it has over the full cache, the bare policy and Baseline+; the share
    that it recovers of the gap of `gap`, bare H2O's if that was measured; and what it removes of Baseline+'s loss.

    own, full, gap, bare, plus (n,), None where there is none. A loss of less than two standard errors has no shares.
    """
    nats = "perplexity" in name
    value, stderr = mean(own)
    found: dict = {"column": name, "n": len(own), "value": value, "stderr": stderr}
    if nats:
        found |= {"value": torch.tensor(value).exp().item()} | {"stderr": stderr * torch.tensor(value).exp().item()}
    for other, of in (("full", full), ("bare", bare), ("plus", plus)):
        if of is not None:
            found[f"over_{other}"] = mean(own - of)
    for share, lost, of in (("recovered", gap, torch.exp if nats else torch.clone), ("removed", plus, torch.clone)):
        if full is not None and lost is not None:
            loss, error = mean(lost - full if nats else full - lost)
            if loss > 2 * error:
                found[share] = share_recovered(full, lost, own, of=of)
    return found


def report(chosen) -> None:
    inputs, measured = (json.loads(file.read_text(encoding="utf-8")) for file in (chosen.inputs, chosen.results))
    tasks: list = []
    for name in ("kernels", "versions"):
        if len({json.dumps(record.get(name)) for record in measured["results"] if record["cache"] != "full"}) > 1:
            raise LessError(f"{chosen.results} has figures of several {name}: measure all with the same")
    if any(PARTS[record["part"]][0] == "tasks" for record in measured["results"]):
        from .harness import load_tasks

        tasks = load_tasks(inputs["about"]["tasks"].split(","))
    records, rows = measured["results"], []
    found = {tuple(record[name] for name in NAMES): columns(record["part"], inputs, record, tasks) for record in records}
    for record in records:
        part, dtype, rule, cache, budgets, context = (record[name] for name in NAMES)
        values = found[part, dtype, rule, cache, budgets, context]
        alike = [other for other in records if (part, dtype) == (other["part"], other["dtype"])]
        kept = {other["rule"]: other["kept"] for other in alike if other["cache"] in ("bare", "less")}
        first = next((of for of in kept if kept[of] == kept.get(rule) and of.startswith("H2O(")), rule)
        row = {name: record[name] for name in (*NAMES, "kept", "seconds")} | {"figures": []}
        for name, own in values.items():
            keys = (first, "bare", "uniform", context), (rule, "bare", "uniform", context), (rule, "baseline+", budgets, context)
            full, gap, bare, plus = (found.get((part, dtype, *key), {}).get(name) for key in ((None, "full", None, None), *keys))
            gap, bare = (None if cache == "full" or of is own else of for of in (gap, bare))
            plus = plus if cache == "less" else None
            row["figures"].append(figure(name, own, full if cache != "full" else None, gap, bare, plus))
            if PARTS[part][0] in ("text", "long"):
                row["figures"][-1]["eighths"] = torch.tensor(record["values"][name.removesuffix(", perplexity")]).mean(0).tolist()
        rows.append(row)
    about = inputs["about"] | {name: measured["results"][0][name] for name in ("device", "versions")}
    write(chosen.out, {"about": about, "rows": rows})
    print(markdown(rows))


def markdown(rows: list[dict]) -> str:
    """A table for each part: values with errors; in brackets the share of the gap, or what is over the full cache."""

    def cell(one):
        scale, places = (1, 2) if "perplexity" in one["column"] else (1, 3) if "rouge" in one["column"] else (100, 1)
        text = f"{one['value'] * scale:.{places}f} ± {one['stderr'] * scale:.{places}f}"
        if "recovered" in one and scale == 1:
            text += " ({:.1%} ± {:.1%})".format(*one["recovered"])
        elif "over_full" in one and scale == 100:
            text += " ({:+.1f} ± {:.1f})".format(*(100 * x for x in one["over_full"]))
        return text

    found = []
    for part, dtype in dict.fromkeys((row["part"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["part"], row["dtype"]) == (part, dtype)]
        names = [f"{one['column']} (n = {one['n']})" for one in own[0]["figures"]]
        lines = []
        for row in own:
            within = row["context"] and f"within {row['context']}"
            name = ", ".join(filter(None, (row["cache"], row["rule"], row["budgets"], within)))
            lines.append([name, str(row["kept"] or "all"), *map(cell, row["figures"])])
        found.append(f"{part}, {dtype}:\n\n{script.markdown(['cache', 'kept', *names], lines)}")
    return "\n\n".join(found)


def options(arguments):
    parser = argparse.ArgumentParser(prog="python -m paper_checks.real_model", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prepare", help="texts, questions and prompts, as tokens, into one file")
    verb.add_argument("inputs", type=Path)
    for option in ("--text", "--long", "--summaries", "--answers"):
        verb.add_argument(option, type=named, action="append", default=[], metavar="NAME=WHERE")
    verb.add_argument("--tasks", default="", help="of lm-evaluation-harness, separated by commas")
    for option, number in dict(
        windows=64, length=1024, long_windows=8, long_length=8192, questions=400, texts=64, numbers=64, seed=0
    ).items():
        verb.add_argument(f"--{option.replace('_', '-')}", type=int, default=number)
    verb = verbs.add_parser("measure", help="what every cache makes of them")
    verb.add_argument("inputs", type=Path)
    verb.add_argument("results", type=Path)
    verb.add_argument("--kernels", default="", help="folder; those that come with the package for the model by default")
    verb.add_argument("--device", default="cpu")
    verb.add_argument("--dtype", default="float32")
    verb.add_argument("--parts", default="", help=f"of {'; '.join(PARTS)}: separated by commas; all that the inputs have")
    verb.add_argument("--policies", default="h2o", help="separated by commas")
    verb.add_argument("--budgets", default="5%", help="tokens kept, or shares of a window, separated by commas")
    verb.add_argument("--caches", default="", help=f"of {', '.join(CACHES)}: separated by commas; all by default")
    verb.add_argument("--context", type=int, help="positions that all caches but the full one stay within; as many as tokens")
    verb.add_argument("--batch", type=int, default=512, help="windows or questions in one forward pass")
    for verb in verbs.choices.values():
        verb.add_argument("--model", default="", help="folder, hub name or smollm2; the embedded model by default")
    verb = verbs.add_parser("report", help="figures with their errors, as JSON and Markdown")
    for name in ("inputs", "results", "out"):
        verb.add_argument(name, type=Path)
    return parser.parse_args(arguments)


def named(text: str) -> list[str]:
    """NAME=WHERE in two."""
    name, equals, where = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"NAME=WHERE, not {text!r}")
    return [name, where]


def main(arguments=None) -> int:
    chosen = options(arguments)
    return script.run("real_model", lambda: {"prepare": prepare, "measure": measure, "report": report}[chosen.verb](chosen))


if __name__ == "__main__":
    sys.exit(main())

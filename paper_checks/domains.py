"""Beyond text (the paper's outlook): LESS on pictures, pixel by pixel, and on a pulse, sample by sample.

    pip install scikit-image heartpy                             # the data; nothing of theirs is computed with
    python -m paper_checks.domains                               # both, some twenty minutes of a core
    python -m paper_checks.domains --domains pulse --tokens 500000

For each a small decoder is trained, then kernels for it, and held-out windows are compared as texts are: full cache, bare H2O,
Baseline+ and LESS. Pictures: photographs of scikit-image, grey, LEVELS levels, in strips that are read line by line; those held
out are of other scenes. Pulse: the third example of HeartPy, eighteen minutes of one sensor; its last fifth is held out.
"""

import sys
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from less_fast import H2O, LessError
from less_fast.measuring.compare import compare, table
from less_fast.training import RECIPES, train

from . import build_model, script

LENGTH = 1024  # tokens of a window
LEVELS = 32  # of brightness, and of the pulse
WIDTH = 32  # pixels of a line of a strip
SEEN = ("astronaut", "brick", "camera", "chelsea", "coins", "grass", "gravel", "moon")
HELD_OUT = ("coffee", "rocket")
RECIPE = replace(RECIPES["exponential"], rho=0, joint_steps=60, curves=0)
MOST = 96  # windows that kernels are trained on
BUDGETS = 20, 51, 102  # tokens kept: 2, 5 and 10 %
VALIDATION = 8  # windows that judge the training


def pictures() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(to train on, held out): strips of photographs, int64 (lines * WIDTH,) each."""
    from skimage import data
    from skimage.color import rgb2gray
    from skimage.transform import resize

    def strips(name):
        picture = getattr(data, name)()
        grey = rgb2gray(picture) if picture.ndim == 3 else picture / 255  # (lines, columns), 0 to 1
        half = resize(grey, [size // 2 for size in grey.shape], anti_aliasing=True)
        columns = half[:, : half.shape[1] // WIDTH * WIDTH]
        return [strip.ravel() for strip in np.hsplit(steps(columns, 0, 1), columns.shape[1] // WIDTH)]

    return tuple([strip for name in names for strip in strips(name)] for names in (SEEN, HELD_OUT))


def pulse() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The same of a pulse, int64 (samples,) each."""
    found = find_spec("heartpy")
    if found is None or found.origin is None:
        raise ImportError("No module named 'heartpy'")
    samples = np.loadtxt(Path(found.origin).parent / "data" / "data3.csv", delimiter=",", skiprows=1, usecols=1)  # (samples,)
    cut = len(samples) * 4 // 5
    lowest, highest = np.quantile(samples[:cut], [0.005, 0.995])
    levels = steps(samples, lowest, highest)
    return [levels[:cut]], [levels[cut:]]


def steps(values: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    """Which of LEVELS equal steps from `lowest` to `highest` each value is on, int64; the outermost for what lies beyond."""
    return np.clip((values - lowest) / (highest - lowest) * LEVELS, 0, LEVELS - 1).astype(np.int64)


DOMAINS = {"pictures": pictures, "pulse": pulse}


def windows(streams: list[np.ndarray]) -> torch.Tensor:
    """All whole windows of the streams, one after the other: int64 (W, LENGTH)."""
    cut = [stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH) for stream in streams]
    return torch.from_numpy(np.concatenate(cut))


def decoder(streams: list[np.ndarray], held_out: torch.Tensor, tokens: int) -> LlamaForCausalLM:
    """A Llama of 0.8 million parameters that was trained on the streams for so many tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LEVELS,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    build_model.train(model, streams, held_out, tokens, 8)
    return model.eval().requires_grad_(False)


def measure(name: str, tokens: int, most: int) -> tuple[dict, list]:
    """A decoder and kernels for one domain, and what the caches make of at most `most` held-out windows: for the report, and the
    rows."""
    began = time.perf_counter()
    streams, others = DOMAINS[name]()
    training, held_out = windows(streams), windows(others)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    own, validation = training[order[VALIDATION:]], training[order[:VALIDATION]]
    reported = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:most]]
    model = decoder(streams, validation, tokens)
    kernels = train(model, own[:MOST], validation, H2O(26, 25).with_budget(BUDGETS[1]), RECIPE)
    rows = compare(model, reported, [H2O(26, 25).with_budget(budget) for budget in BUDGETS], {"LESS": kernels})
    said = {"training_windows": len(training), "held_out": len(reported), "seconds": round(time.perf_counter() - began)}
    return said | {"rows": [asdict(row) for row in rows]}, rows


def main(arguments=None) -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--domains", default=",".join(DOMAINS), help="some of these")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="that a decoder is trained on")
    parser.add_argument("--windows", type=int, default=48, help="held out, at most")
    parser.add_argument("--out", type=Path, default=script.RESULTS / "domains.json")
    chosen = parser.parse_args(arguments)
    found: dict = {}

    def act():
        script.known("domain", chosen.domains.split(","), DOMAINS)
        for name in chosen.domains.split(","):
            try:
                found[name], rows = measure(name, chosen.tokens, chosen.windows)
            except ImportError as error:
                raise LessError(f"{error}: pip install scikit-image heartpy") from error
            Console(width=120).print(table(rows, f"{name}, {found[name]['held_out']} held-out windows"))
            script.write(chosen.out, {"tokens": chosen.tokens, "recipe": asdict(RECIPE)}, found)

    return script.run("domains", act)


if __name__ == "__main__":
    sys.exit(main())

"""The options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from ..gguf import CARRIED
from ..loading import SHAPES
from ..setting import POLICIES

LONGEST = 2**31 - 2  # positions are int32
BEST = "best"

WHICH_MODEL = f"Folder, GGUF file or hub name of a model, or {' or '.join(CARRIED)}"
ModelOption = Annotated[str, typer.Option("--model", help=f"{WHICH_MODEL}; the embedded one by default.")]
ShapeOption = Annotated[str, typer.Option("--model", help=f"{WHICH_MODEL}, or {', '.join(SHAPES)}; the embedded one by default.")]
WHICH_KERNELS = "Folder or hub name of kernels; none; or performer, elu: controls. "
KernelsOption = Annotated[str, typer.Option("--kernels", help=WHICH_KERNELS + "Those of the package by default.")]
POLICY_NAMES = ", ".join(POLICIES)
PolicyOption = Annotated[str, typer.Option("--policy", metavar="NAME", help=f"Which tokens are kept: {POLICY_NAMES}.")]
BestOption = Annotated[
    str,
    typer.Option("--policy", metavar="NAME", help=f"Which tokens are kept: best (by head, for these kernels), {POLICY_NAMES}."),
]
BudgetOption = Annotated[str, typer.Option("--budget", help="What each KV head keeps: tokens, or a share of the length.")]
TextOption = Annotated[list[Path], typer.Option("--text", help="Text file, may be repeated; the standard library by default.")]
DatasetOption = Annotated[
    str, typer.Option("--dataset", help="NAME[,CONFIG[,SPLIT[,COLUMN]]] of a data set instead of files (needs datasets).")
]
LengthOption = Annotated[int, typer.Option("--length", min=32, max=LONGEST, help="Tokens in a window.")]
TokensOption = Annotated[str, typer.Option("--budget", help="Tokens that each KV head keeps.")]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the decoding step first.")]
Int8Option = Annotated[bool, typer.Option("--int8", help="Keys and values in eight bits: half the bytes.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="NAME", help="Of model and cache: float32, bfloat16 or float16.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, metavar="N", help="Random seed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace kernels that are in the folder already.")]

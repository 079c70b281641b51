"""The report of a run: JSON with every number, Markdown, and HTML with the pictures in it."""

import base64
import html
import io
import json
from pathlib import Path

import matplotlib

from less_fast.files import aside

from .check import Finding

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def write(folder: Path, checks: dict[str, tuple[object, Finding, float]], about: dict) -> None:
    """checks: by name, the module, what it found, and how many seconds it took. Each file is written aside, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        name: {"claim": module.CLAIM, "paper": module.PAPER, "verdict": finding.verdict, "sentence": finding.sentence}
        | {"figures": finding.figures, "seconds": round(seconds, 1)}
        for name, (module, finding, seconds) in checks.items()
    }
    pictures = {name: picture(draw) for _, finding, _ in checks.values() for name, draw in finding.pictures.items()}
    files = {f"{name}.png": content for name, content in pictures.items()}
    files["report.json"] = (json.dumps({"about": about, "checks": record}, indent=2) + "\n").encode()
    files["report.md"] = markdown(checks, about).encode()
    files["report.html"] = page(checks, about, pictures).encode()
    for name, content in files.items():
        with aside(folder / name) as file:
            file.write(content)


def picture(draw) -> bytes:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    draw(axes)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    return stream.getvalue()


def markdown(checks, about) -> str:
    lines = ["# The paper's claims, measured", "", ", ".join(f"{name}: {value}" for name, value in about.items()), ""]
    lines += ["| claim | the paper | verdict | measured |", "|---|---|---|---|"]
    for module, finding, _ in checks.values():
        lines.append(f"| {module.CLAIM} | {module.PAPER} | **{finding.verdict}** | {finding.sentence} |")
    for name, (module, finding, seconds) in checks.items():
        lines += ["", f"## {name}", "", f"{module.CLAIM}. **{finding.verdict}**: {finding.sentence}. ({seconds:.0f} s)"]
        if finding.rows:
            lines += ["", "| " + " | ".join(finding.headings) + " |", "|" + "---|" * len(finding.headings)]
            lines += ["| " + " | ".join(row) + " |" for row in finding.rows]
        lines += [f"\n![{picture}]({picture}.png)" for picture in finding.pictures]
    return "\n".join(lines) + "\n"


def page(checks, about, pictures) -> str:
    def table(headings, rows):
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table>"

    parts = [
        "<!doctype html><meta charset='utf-8'><title>The paper's claims, measured</title><style>body{font:16px/1.5 system-ui;"
        "max-width:60rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px "
        "solid #ccc;padding:.25rem .6rem;text-align:left}img{max-width:100%}</style><h1>The paper's claims, measured</h1>",
        f"<p>{html.escape(', '.join(f'{name}: {value}' for name, value in about.items()))}</p>",
        table(
            ["claim", "the paper", "verdict", "measured"],
            [[module.CLAIM, module.PAPER, finding.verdict, finding.sentence] for module, finding, _ in checks.values()],
        ),
    ]
    for name, (module, finding, _) in checks.items():
        parts.append(
            f"<h2>{name}</h2><p>{html.escape(module.CLAIM)}. <b>{finding.verdict}</b>: {html.escape(finding.sentence)}.</p>"
        )
        if finding.rows:
            parts.append(table(finding.headings, finding.rows))
        for picture in finding.pictures:
            coded = base64.b64encode(pictures[picture]).decode()
            parts.append(f"<img alt='{picture}' src='data:image/png;base64,{coded}'>")
    return "".join(parts) + "\n"

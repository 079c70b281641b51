"""The Hugging Face hub: where kernels are found, the card that they carry, and how they are uploaded."""

from pathlib import Path
from tempfile import TemporaryDirectory

WEIGHTS, CONFIG, CARD = "kernels.safetensors", "config.json", "README.md"
CARD_BEGINS = "---\nlibrary_name: less-kv\n"


def locate(where) -> tuple[Path, Path]:
    """The weights and the config of a local folder, or of a repository of the hub. FileNotFoundError if there are none."""
    folder = Path(where)
    if folder.is_dir():
        missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"the folder {where} holds no kernels: {missing[0]} is missing")
        return folder / WEIGHTS, folder / CONFIG
    if "/" not in str(where):
        raise FileNotFoundError(f"no kernels at {where}: there is no such folder, and a repository of the hub is OWNER/NAME")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(where), WEIGHTS)), Path(hf_hub_download(str(where), CONFIG))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"no kernels at {where}: neither a folder nor a repository of the hub") from error


def upload(kernels, repository: str, private: bool) -> str:
    """Uploads the kernels, their config and the card; returns the repository's address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    with TemporaryDirectory() as folder:
        kernels.save_pretrained(folder)
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="LESS kernels")
    return str(address)


def card(kernels) -> str:
    """What the hub shows of LessKernels: what they are for, how they came about, how to use them."""
    about, sizes = kernels.about, kernels.sizes
    served = [layer.rank for layer in kernels.layers if layer.rank or sizes["family"] == "none"]
    of = f"{len(served)} of " * (len(served) < sizes["layers"])
    lines = [
        CARD_BEGINS + "tags: [less, kv-cache, long-context]\n---\n",
        f"# LESS kernels for {about.get('model', 'a model of the shape below')}",
        "",
        f"Kernels of the {sizes['family']} family for {of}{sizes['layers']} layers, {sizes['query_heads']} query heads and "
        f"{sizes['kv_heads']} KV heads of {sizes['head_dim']}, {max(served)} features for each KV head.",
        "They generate text in constant memory: what a policy evicts is folded into a small state (LESS, arXiv 2402.09398).",
        "",
        "```python",
        "from less_fast import LessCache, LessKernels",
        "",
        "cache = LessCache.for_model(model, kernels=LessKernels.from_pretrained(WHERE), budget=64)",
        "model.generate(**inputs, past_key_values=cache)",
        "```",
        "",
    ]
    if {"policy", "sequences", "window"} <= about.keys():
        lines.append(f"Trained for {about['policy']} on {about['sequences']} windows of {about['window']} tokens.")
    if "rho" in sizes:
        lines.append("They come with rho, a learned function that says what is worth keeping: for the policy Retention.")
    of_layers = about.get("layers", {"budgets": [], "left": []})
    for budget, left in zip(of_layers["budgets"], of_layers["left"]):
        shares = f"{sum(left) / len(left):.2f} on average ({min(left):.2f} to {max(left):.2f})"
        lines.append(f"Of what the bare policy costs at {budget} tokens a layer alone leaves {shares}.")
    for stage, tables in (("joint", "under uniform budgets"), ("tables", "under budget tables")):
        if figures := about.get(stage):
            by_budget = zip(figures["budgets"], figures["before"], figures["after"])
            nats = "; ".join(f"{budget}: {before:.3f} to {after:.3f}" for budget, before, after in by_budget)
            lines.append(f"All layers together {tables}: divergence from the full cache, by budget, {nats} nats.")
    if kernels.curves:
        lines.append(f"Budget tables are derived from curves for {', '.join(kernels.curves)} in {CONFIG}.")
    return "\n".join([*lines, f"All settings and figures: {CONFIG}.", ""])

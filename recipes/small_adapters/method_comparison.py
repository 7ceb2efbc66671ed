"""Results in the form of PEFT's method_comparison: a file for each final cell.

Their form has a place for PEFT's methods and for full fine-tuning, so no other arm is written.
What a task of classification does not have (prompts, generation) is empty; accelerator memory is 0
for what ran on a CPU, tokens are 0 for images. ``dtype`` is the model's, files are in float16.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pemn_surgery.recipe import Recipe
from pemn_surgery.recipe.classification import TESTED_AT_ONCE
from pemn_surgery.recipe.options import option

Cell = dict[str, Any]
FULL = "full-finetuning"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``method_comparison``."""

    out: Path | None = option("their folder (default: method_comparison beside the results)", None)
    results: Path | None = None


def run(recipe: Recipe, options: Options, console: Console) -> tuple[()]:
    """Write a file for each final cell of every result."""
    folder = options.results or recipe.folder / "results"
    out = options.out or folder / "method_comparison"
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        for cell in filter(_has_a_place, result["cells"]):
            text = json.dumps(entry(result, cell), indent=2) + "\n"
            name = _name(result, cell).replace("/", "--")
            (out / f"{name}.json").write_text(text, encoding="utf-8")
            count += 1
    console.print(f"{count} files written to {out}")
    return ()


def _has_a_place(cell: Cell) -> bool:
    is_whole = cell["trained"] == cell["total"]
    return cell["stage"] == "final" and bool(cell.get("peft_config") or is_whole)


def _name(result: dict[str, Any], cell: Cell) -> str:
    config = cell["peft_config"]
    kind = config["peft_type"].lower() if config else FULL
    return f"{kind}/{result['settings']['case']}-{cell['arm']}-s{cell['seed']}"


def entry(result: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Return what their file holds of one cell."""
    sitting = result["sittings"][cell["sitting"]]
    run_info = {
        "created_at": cell["created"],
        "total_time": cell["seconds"] + _tested(cell),
        "experiment_name": _name(result, cell),
        "peft_branch": "main",
        "train_config": _train_config(result, cell),
        "peft_config": cell["peft_config"],
        "error_msg": "",
    }
    return {
        "run_info": run_info,
        "train_info": _train_info(result, cell),
        "meta_info": _meta_info(sitting),
    }


def _tested(cell: Cell) -> float:
    return cell["test_seconds"] + sum(row["test_seconds"] for row in cell["epochs"])


def _train_config(result: dict[str, Any], cell: Cell) -> dict[str, Any]:
    settings, rule = result["settings"], result["settings"]["rule"]
    return {
        "model_id": settings["network"],
        "dtype": "float32",
        "max_seq_length": settings["longest"],
        "batch_size": rule["batch"],
        "batch_size_eval": TESTED_AT_ONCE,
        "max_steps": cell["steps"],
        "eval_steps": cell["steps"] // len(cell["epochs"]),
        "compile": False,
        "use_gc": False,
        "query_template": "{query}",
        "seed": cell["seed"],
        "grad_norm_clip": 0.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": cell["rate"], "weight_decay": rule.get("weight_decay", 0.0)},
        "lr_scheduler": rule["schedule"],
        "use_amp": settings["precision"] == "bf16",
        "autocast_adapter_dtype": True,
        "generation_kwargs": {},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _train_info(result: dict[str, Any], cell: Cell) -> dict[str, Any]:
    memory = cell["memory"]
    weights = [
        size for name, size in cell["bytes"]["files"].items() if name.endswith(".safetensors")
    ]
    return {
        "accelerator_memory_reserved_avg": memory["mean"],
        "accelerator_memory_max": memory["max"],
        "accelerator_memory_reserved_99th": memory["p99"],
        "train_time": cell["seconds"],
        "file_size": sum(weights),
        "num_trainable_params": cell["trained"],
        "num_total_params": cell["total"],
        "status": "success",
        "metrics": [*_metrics(result, cell)],
    }


def _metrics(result: dict[str, Any], cell: Cell) -> Iterator[dict[str, Any]]:
    rows, each = result["settings"]["rows"]["train"], cell["steps"] // len(cell["epochs"])
    elapsed = 0.0
    for row in cell["epochs"]:
        elapsed += row["seconds"] + row["test_seconds"]
        yield {
            "step": row["epoch"] * each,
            "valid accuracy": row["validation"] / 100,
            "train loss": row["train_loss"],
            "train samples": row["epoch"] * rows,
            "train time": row["seconds"],
            "eval time": row["test_seconds"],
            "elapsed time": elapsed,
        }
    epochs = len(cell["epochs"])
    yield {
        "step": cell["steps"],
        "test accuracy": cell["test"] / 100,
        "train loss": cell["epochs"][-1]["train_loss"],
        "train samples": epochs * rows,
        "train total tokens": epochs * result["settings"]["tokens"],
    }


def _meta_info(sitting: dict[str, Any]) -> dict[str, Any]:
    versions = sitting["versions"]
    packages = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    info = {f"{name}-version": versions.get(name) for name in packages}
    return {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {},
        "package_info": info | {f"{name}-commit-hash": None for name in packages},
        "system_info": sitting["system"] | {"accelerator": sitting["machine"]["accelerator"]},
        "pytorch_info": sitting["build"],
    }

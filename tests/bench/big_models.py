"""Memory of models that are built on the meta device and pemnified for inference.

    python tests/bench/big_models.py --sizes 0.1B 1.3B 7B --json docs/results/big_models.json

Each run is a process of its own. It builds a Llama-shaped model under torch.device("meta"), plans
it, gives it masks on a random vector (rp, ratio 1e-2, initial masks as bits), runs one forward of
16 tokens, and reports the highest resident memory (VmHWM) of each phase less what was resident
after the imports. The load phase reads the saved adapter onto a new meta model, again in its own
process. Linux only: the high-water mark is read from /proc/self/status and reset through
/proc/self/clear_refs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SIZES = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
    "0.4B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24},
    "1.3B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
}
OPTIONS = {"bank": "rp", "ratio": 1e-2, "seed": 0}
TOKENS = 16


def main() -> None:
    """Measure every size and print or write the result."""
    arguments = parse()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](arguments.sizes[0], arguments.folder)))  # noqa: T201
        return
    result = {
        "command": "python tests/bench/big_models.py " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "options": {**OPTIONS, "inference_mode": True, "dtype": "float32", "tokens": TOKENS},
        "runs": [measure(size, arguments.repeats) for size in arguments.sizes],
    }
    text = json.dumps(result, indent=1)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    print(text)  # noqa: T201


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.bench.big_models --sizes 0.1B --json big_models.json",
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.1B", "0.4B", "1.3B"])
    parser.add_argument("--repeats", type=int, default=1, help="processes a size (default 1)")
    parser.add_argument("--json", metavar="OUT", help="also write the result to this file")
    parser.add_argument("--child", choices=("make", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(size: str, repeats: int) -> dict[str, Any]:
    """Run one size in processes of its own."""
    made, loaded = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            made.append(run_child("make", size, folder))
            loaded.append(run_child("load", size, folder))
    same = all(run["logits_sum"] == made[0]["logits_sum"] for run in made + loaded)
    return {
        "size": size,
        "plan": made[0]["plan"],
        "bytes": made[0]["bytes"],
        "largest_effective_weight": made[0]["largest_effective_weight"],
        "seconds": spread([run["seconds"] for run in made]),
        "peak_bytes": spread([run["peak_bytes"] for run in made]),
        "peak_over_held": spread([run["peak_over_held"] for run in made]),
        "load": {
            "seconds": spread([run["seconds"] for run in loaded]),
            "peak_bytes": spread([run["peak_bytes"] for run in loaded]),
            "peak_over_held": spread([run["peak_over_held"] for run in loaded]),
        },
        "loaded_model_has_the_same_logits": same,
    }


def run_child(kind: str, size: str, folder: str) -> dict[str, Any]:
    """Return what a child process printed."""
    command = [sys.executable, __file__, "--child", kind, "--sizes", size, "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"{' '.join(command)} failed with {done.returncode}: {done.stderr[-2000:]}"
        raise RuntimeError(message)
    return json.loads(done.stdout.splitlines()[-1])


def spread(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return median, least and most of every figure."""
    return {
        key: {
            "median": statistics.median(run[key] for run in runs),
            "min": min(run[key] for run in runs),
            "max": max(run[key] for run in runs),
        }
        for key in runs[0]
    }


class Phases:
    """Seconds and highest resident memory of one phase after the other."""

    def __init__(self) -> None:
        self.baseline = status("VmRSS")
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Return what ``work`` returns."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        start = time.perf_counter()
        value = work()
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.peaks[name] = status("VmHWM") - self.baseline
        return value

    def report(self, held: int) -> dict[str, Any]:
        """Return the figures, and each peak over the bytes that the model holds."""
        ratios = {name: round(peak / held, 3) for name, peak in self.peaks.items()}
        return {"seconds": self.seconds, "peak_bytes": self.peaks, "peak_over_held": ratios}


def make(size: str, folder: str) -> dict[str, Any]:
    """Build, plan, pemnify and run a model; save its adapter."""
    from pemn_surgery import pemnify, plan

    prepare()
    phases = Phases()
    base = phases.run("build", lambda: llama(size))
    made = phases.run("plan", lambda: plan(base, **OPTIONS))
    model = phases.run("pemnify", lambda: pemnify(base, inference_mode=True, **OPTIONS)).eval()
    total = phases.run("forward", lambda: forward(model))
    held = held_bytes(model)
    report = phases.report(sum(held.values()))
    model.save_pretrained(folder)
    largest = max(target.weights for target in made.targets) * 4
    totals = {"parameters": made.parameters, "masked_weights": made.masked_weights}
    totals |= {"mask_bytes": made.mask_bytes, "bank_floats": made.bank_floats}
    return {
        "plan": {**totals, "other_bytes": made.other_bytes},
        "bytes": held,
        "largest_effective_weight": largest,
        "logits_sum": total,
        **report,
    }


def load(size: str, folder: str) -> dict[str, Any]:
    """Load the saved adapter onto a model on the meta device and run it."""
    from peft import PeftModel

    import pemn_surgery.adapters  # noqa: F401 - makes PEFT know the method

    prepare()
    phases = Phases()
    base = phases.run("build", lambda: llama(size))
    model = phases.run("load", lambda: PeftModel.from_pretrained(base, folder)).eval()
    total = phases.run("forward", lambda: forward(model))
    return {"logits_sum": total, **phases.report(sum(held_bytes(model).values()))}


CHILDREN: dict[str, Callable[[str, str], dict[str, Any]]] = {"make": make, "load": load}


def prepare() -> None:
    """Import everything, and run a tiny model once, so that the baseline holds the libraries."""
    import torch

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    forward(llama("0.1B", device="cpu", vocab_size=64, num_hidden_layers=1))


def llama(size: str, device: str = "meta", **changes: Any) -> Any:
    """Return a Llama of the given size, in float32, vocabulary of 32,000, 128 numbers a head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**SIZES[size], "vocab_size": 32000, **changes}
    heads = shape["hidden_size"] // (128 if shape["hidden_size"] >= 2048 else 64)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=heads, **shape))


def forward(model: Any) -> float:
    """Run 16 tokens; return the sum of the logits."""
    import torch

    with torch.no_grad():
        logits = model(torch.arange(TOKENS).unsqueeze(0), use_cache=False).logits
    return float(logits.double().sum())


def held_bytes(model: Any) -> dict[str, int]:
    """Return the bytes of all tensors that a model holds, each storage once, by kind."""
    from torch import nn

    from pemn_surgery.masks.adapter_mask import AdapterMask
    from pemn_surgery.numbers.bank import Bank

    kinds = {AdapterMask: "bits", Bank: "bank", nn.Embedding: "embeddings"}
    held = dict.fromkeys((*kinds.values(), "others"), 0)
    seen: set[int] = set()
    for module in model.modules():
        found = (name for kind, name in kinds.items() if isinstance(module, kind))
        kind = next(found, "others")
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held[kind] += storage.nbytes()
    return held


def status(field: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    return {"cores": os.cpu_count(), "cpu": next(iter(names), "unknown"), "threads": threads}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


if __name__ == "__main__":
    main()

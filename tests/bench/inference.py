"""What a model that stays packed takes beside a dense one, at one input and a few.

Two parts, in one process and one thread. *Layers*: products of a 4096 x 4096 weight, from DRAM (a
row of several weights, one after the other), by looked-up sums or number by number in each
instruction set, beside ``F.linear`` in float32 and bfloat16. *Words*: words a second of a model of
Llama's shape with random masks and a key-value cache, packed, and of dense ones in float32 and
bfloat16; and what its masked layers hold. Ways take turns, medians are shown, and ratios are of one
run.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pemn_surgery import PemnConfig, freeze, pemnify
from pemn_surgery.coding import bits
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.kernels import library
from pemn_surgery.kernels.bit_rows import bit_rows
from pemn_surgery.kernels.look_up import Packed, pack
from pemn_surgery.masks.freezing import PackedForward
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import table

SIDE, WEIGHTS = 4096, 4  # of a layer; so many of them are larger than any cache
PERIODS = {  # of the bank's numbers in a weight; those of whole rows are looked up
    "one row": SIDE,
    "8 rows": 8 * SIDE,
    "64 rows": 64 * SIDE,
    "1 %": SIDE * SIDE // 100 + 1,
    "all numbers": SIDE * SIDE,
}
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10, "vocab_size": 512}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 512}


def layers(rounds: int) -> list[dict[str, Any]]:
    """Time products of one weight in all ways; a row for each bank and number of inputs."""
    dense = [torch.randn(SIDE, SIDE) for _ in range(WEIGHTS)]
    halves = [weight.bfloat16() for weight in dense]
    sets = {found.instructions: found for found in library.all_kernels()}
    found = []
    for name, length in PERIODS.items():
        period = torch.randn(length)
        packed = [_packed(torch.rand(SIDE, SIDE) < 0.5, period) for _ in range(WEIGHTS)]
        for samples in (1, 4, 8):
            inputs = torch.randn(samples, SIDE)
            half = inputs.bfloat16()
            ways: dict[str, Callable[[int], Any]] = {
                "float32": lambda i, x=inputs: F.linear(x, dense[i]),
                "bfloat16": lambda i, x=half: F.linear(x, halves[i]),
            }
            for instructions, kernels in sets.items():
                ways[instructions] = lambda i, x=inputs, k=kernels, p=packed: _through(k, p[i], x)
            seconds = _interleaved(ways, rounds)
            found.append({"bank": name, "inputs": samples, "ways": seconds})
    return found


def _packed(mask: Tensor, period: Tensor) -> Callable[[Tensor], Tensor]:
    stored = bits.pack(mask)[HEADER_BYTES:]
    return pack(mask, period) or bit_rows(stored, period, SIDE, SIDE)


def _through(
    kernels: library.Kernels, packed: Callable[[Tensor], Tensor], inputs: Tensor
) -> Tensor:
    before, library.kernels = library.kernels, lambda: kernels
    try:
        return packed(inputs)
    finally:
        library.kernels = before


def _interleaved(ways: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, Any]:
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, call in ways.items():
            started = time.perf_counter()
            for i in range(WEIGHTS):
                call(i)
            if turn:
                taken[way].append((time.perf_counter() - started) / WEIGHTS)
    return {way: spread(values) for way, values in taken.items()}


def words(rounds: int, tokens: int) -> dict[str, Any]:
    """Time words of a generated text in all ways."""
    config = LlamaConfig(**SHAPE, tie_word_embeddings=False)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    masked = packed_model(empty)
    said = freeze(masked, "packed")
    models: dict[str, nn.Module] = {"packed": masked}
    models |= {"float32": LlamaForCausalLM(config).eval()}
    models |= {"bfloat16": LlamaForCausalLM(config).bfloat16().eval()}
    taken: dict[str, list[float]] = {way: [] for way in models}
    for turn in range(rounds + 1):
        for way, model in models.items():
            seconds = _seconds_a_word(model, tokens)
            if turn:
                taken[way].append(seconds)
    children = [one for one in masked.modules() if isinstance(one, MaskedWeight)]
    count = sum(int(torch.Size(one.shape).numel()) for one in children)
    return {
        "masked_weights": count,
        "packed_layers": list(said.values()).count("packed"),
        "lean_layers": list(said.values()).count("lean"),
        "held_bytes": sum(map(_held, children)) + _bank_bytes(children),
        "float32_bytes": 4 * count,
        "seconds_a_word": {way: spread(values) for way, values in taken.items()},
    }


def packed_model(empty: nn.Module) -> nn.Module:
    """Give a model without memory random masks of a seeded bank."""
    config = PemnConfig(bank="rp", length=2048, aligned=True, inference_mode=True)
    model = pemnify(empty, config).eval()
    for child in model.modules():
        if isinstance(child, MaskedWeight):
            stored = bits.pack(torch.rand(child.shape) < 0.5)
            child.pemn_masks["default"].bits.copy_(stored)
    return model


def _seconds_a_word(model: nn.Module, tokens: int) -> float:
    word, cache = torch.tensor([[5]]), None
    with torch.no_grad():
        for turn in range(tokens + 1):
            if turn == 1:  # the first word makes what is packed
                started = time.perf_counter()
            found = model(input_ids=word, past_key_values=cache, use_cache=True)
            cache, word = found.past_key_values, found.logits[:, -1:].argmax(-1)
    return (time.perf_counter() - started) / tokens


def _held(child: MaskedWeight) -> int:
    """Bytes of a mask, and of what was packed of it."""
    forward = child.owner.__dict__.get("forward")
    held = child.pemn_masks["default"].bits.numel()
    if isinstance(forward, PackedForward):
        for _, packed in forward.packed.values():
            own = [packed.words, packed.rows] if isinstance(packed, Packed) else [packed.numbers]
            held += 4 * sum(one.numel() for one in own)
    return held


def _bank_bytes(children: list[MaskedWeight]) -> int:
    bank = children[0].bank
    return 0 if bank is None else bank.values.numel() * bank.values.element_size()


def spread(values: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {key: round(value, 6) for key, value in found.items()}


def show(result: dict[str, Any]) -> None:
    console = Console()
    ways = list(result["layers"][0]["ways"])
    cells = []
    for row in result["layers"]:
        medians = {way: row["ways"][way]["median"] for way in ways}
        times = [f"{1e3 * medians[way]:.3f}" for way in ways]
        best = medians[ways[-1]]
        ratios = [f"{medians[dense] / best:.1f}" for dense in ("float32", "bfloat16")]
        cells.append([row["bank"], str(row["inputs"]), *times, *ratios])
    heads = ("bank repeats", "inputs", *(f"{way}, ms" for way in ways), "x float32", "x bfloat16")
    console.print(table(f"{SIDE} x {SIDE}", heads, cells))
    told = result["words"]
    seconds = {way: one["median"] for way, one in told["seconds_a_word"].items()}
    rows = [
        [way, f"{1 / value:.1f}", f"{seconds['float32'] / value:.1f}"]
        for way, value in seconds.items()
    ]
    title = f"Llama's shape, {told['masked_weights']:,} masked weights"
    console.print(table(title, ("way", "words a second", "x float32"), rows))
    share = told["float32_bytes"] / told["held_bytes"]
    console.print(f"masked layers hold 1/{share:.1f} of float32")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.bench.inference --json docs/results/inference.json",
    )
    parser.add_argument("--rounds", type=int, default=9, help="of each way")
    parser.add_argument("--tokens", type=int, default=8, help="words of a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    found = {"layers": layers(given.rounds), "words": words(given.rounds, given.tokens)}
    show(found)
    if given.json:
        command = " ".join(["python -m tests.bench.inference", *sys.argv[1:]])
        result = {"command": command, "environment": environment(), **found}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

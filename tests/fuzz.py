"""Damage adapter files at random: every outcome is a named error or the same adapter.

    python -m tests.fuzz --files 100000 --loads 500 --json docs/results/fuzz.json

A case is one alteration of one of the two files: bytes changed, cut, inserted, repeated; or, so
that the outer layers let it pass, fields of the safetensors header or of the configuration or bytes
of a mask changed and the rest made fit. Each case may take five seconds of the processor, and all
of them together a limited memory.
"""

import argparse
import copy
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.config import PeftConfig
from safetensors.torch import load
from torch import nn

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import PemnError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FREE = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "digest"}  # fmt: skip
SECONDS, MEMORY = 5, 2 << 30
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, 1e308, 2**31, 2**63, 2**64 - 1, 2**64, 10**30, "", "0",
    "PEMN", "LORA", "\u0000", "F64", "I4", [], [0], [2**40, 2**40], [-1], [0, 2**63], {}, {"a": 1},
    [[[]]], "x" * 1000,
)  # fmt: skip
TYPES = (
    "U8",
    "I8",
    "F32",
    "F16",
    "BF16",
    "I64",
    "F64",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
    "X",
)


class Hang(BaseException):
    """A case took too long."""


def bytes_changed(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(changed))
        changed[place] ^= rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))
    return bytes(changed)


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def inserted(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    new = bytes(rng.randrange(256) for _ in range(rng.choice((1, 1, 8, 64))))
    return content[:place] + new + content[place:]


def removed(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + content[place + rng.choice((1, 1, 8, 64)) :]


def repeated(content: bytes, rng: random.Random) -> bytes:
    start, length, place = (rng.randrange(len(content)) for _ in range(3))
    return content[:place] + content[start : start + length % 64] + content[place:]


def length_changed(content: bytes, rng: random.Random) -> bytes:
    """Another length of the safetensors header."""
    length = rng.choice(
        (0, 1, 7, len(content), 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(5000))
    )
    return length.to_bytes(8, "little") + content[8:]


def header_changed(content: bytes, rng: random.Random) -> bytes:
    """One field of the safetensors header, with its length made right."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    key = rng.choice(list(header))
    if key == "__metadata__":
        inner = rng.choice(list(header[key]))
        header[key][inner] = rng.choice(("", "{}", "[" * 100_000, "null", "pt", '{"digest": null}'))
    else:
        change_entry(header, key, rng)
    return with_header(header, content[end:])


def change_entry(header: dict[str, Any], key: str, rng: random.Random) -> None:
    entry, other = header[key], rng.choice([key for key in header if key != "__metadata__"])
    kind = rng.randrange(6)
    if kind == 0:
        entry["dtype"] = rng.choice(TYPES)
    elif kind == 1:
        entry["shape"] = rng.choice((*ODD, [*entry["shape"], 1], entry["shape"][::-1]))
    elif kind == 2:
        entry["data_offsets"] = rng.choice(
            (*ODD, header[other]["data_offsets"], [2**63, 2**64 - 1])
        )
    elif kind == 3:
        header[key + rng.choice(("x", ".", "\n", "\u0000", "é"))] = header.pop(key)
    elif kind == 4:
        header.pop(key)
    else:
        header[key], header[other] = header[other], entry


def with_header(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def mask_changed(content: bytes, rng: random.Random) -> bytes:
    """A mask's own bytes with its checksum made right, in a file without a seal."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__", None)
    start, stop = rng.choice([v["data_offsets"] for k, v in header.items() if k.endswith(".bits")])
    rest = bytearray(content[end:])
    mask = bytearray(bytes_changed(rest[start:stop], rng))
    checksum = zlib.crc32(mask[20:], zlib.crc32(mask[:16]))
    rest[start:stop] = mask[:16] + checksum.to_bytes(4, "little") + mask[20:]
    return with_header(header, bytes(rest))


def field_changed(content: bytes, rng: random.Random) -> bytes:
    """One field of the configuration."""
    config = json.loads(content)
    key = rng.choice(list(config))
    kind = rng.randrange(4)
    if kind == 0:
        config.pop(key)
    elif kind == 1:
        config[key + "x"] = config.pop(key)
    else:
        config[key] = rng.choice(ODD)
    return json.dumps(config).encode()


def not_a_configuration(content: bytes, rng: random.Random) -> bytes:
    choices = (
        b"",
        b"null",
        b"[]",
        b"1",
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b"9" * 5000,
    )
    return rng.choice(choices)


ON_BYTES = (bytes_changed, bytes_changed, truncated, inserted, removed, repeated)
ON_WEIGHTS = (*ON_BYTES, length_changed, *[header_changed] * 3, *[mask_changed] * 2)
ON_CONFIG = (*ON_BYTES, field_changed, field_changed, not_a_configuration)
Change = Callable[[bytes, random.Random], bytes]


class Case:
    """A whole adapter, and what it means."""

    def __init__(self, folder: Path, coding: str = "context") -> None:
        make(coding).save_pretrained(str(folder))
        self.folder, self.coding = folder, coding
        self.whole = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
        self.tensors = load(self.whole[WEIGHTS])
        self.digest = json.loads(self.whole[CONFIG])["digest"]
        self.meaning = meaning(PemnConfig.from_pretrained(str(folder)))

    def damage(self, rng: random.Random) -> str:
        """Alter one file; return which and how."""
        name = WEIGHTS if rng.random() < 0.7 else CONFIG
        change: Change = rng.choice(ON_WEIGHTS if name == WEIGHTS else ON_CONFIG)
        for other, content in self.whole.items():
            new = change(content, rng) if other == name else content
            (self.folder / other).write_bytes(new)
        return f"{name}: {change.__name__}"

    def outcome(self) -> str:
        """Read the adapter as it is now; return "equal", a named error, or what is wrong.

        "resealed" is a file of its own: a fuzzer that sees what is compared may write the digest
        that an altered file should have. The seal is against damage, not that (docs/format.md).
        """
        try:
            config = PemnConfig.from_pretrained(str(self.folder))
        except PemnError as error:
            return type(error).__name__
        except Exception as error:
            return f"WRONG: {type(error).__name__}: {str(error)[:80]}"
        return self._compared(config)

    def _compared(self, config: PemnConfig) -> str:
        content = (self.folder / WEIGHTS).read_bytes()
        if sealed_digest(content) not in (None, self.digest):
            return "resealed"
        found = load(content)
        same = set(found) == set(self.tensors) and all(
            same_bits(found[key], value) for key, value in self.tensors.items()
        )
        if not same:
            return "WRONG: other tensors"
        return "equal" if meaning(config) == self.meaning else "WRONG: another meaning"


BANKS: dict[str, dict[str, Any]] = {
    "context": {"bank": "rp", "density": 0.8},
    "base": {"bank": "own", "density": 0.8},
    "entropy": {"bank": "rp", "density": 0.8},  # codes of two widths
}
# Seed of the model that is loaded onto: drawn numbers take any.
FRESH = {"context": 1, "base": 0, "entropy": 1}


def make(coding: str) -> PeftModel:
    """A mask of each coding: near its seed or its base, far from it, and too small for either."""
    model = pemnify(base(0), coding=coding, **BANKS[coding])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                near = name.startswith("base_model.model.0.")
                parameter.add_(torch.randn_like(parameter), alpha=1e-3 if near else 1)
        if coding == "base":
            scores = model.base_model.model[0].masked_weight.mask_of("default").scores
            scores.copy_(1 / (model.base_model.model[0].masked_weight.fill().abs() + 1e-2))
    return model


def base(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.Linear(60, 40), nn.Linear(9, 4)
    )  # it is loaded, never run


def sealed_digest(content: bytes) -> str | None:
    """Return the digest in a file's seal if it is that of the content, by docs/format.md alone."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    sealed = json.loads(header.get("__metadata__", {}).get("pemn", "{}"))
    digest = sealed.pop("digest", None)
    described = [
        f"{key} {value.dtype} {list(value.shape)} {zlib.crc32(bytes_of(value)):08x}"
        for key, value in load(content).items()
    ]
    lines = [json.dumps(sealed, sort_keys=True), *sorted(described)]
    actual = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return digest if digest == actual else None


def bytes_of(value: torch.Tensor) -> bytes:
    return value.flatten().view(torch.uint8).numpy().tobytes()


def meaning(config: PemnConfig) -> dict[str, Any]:
    """Return the fields that decide what the masks mean."""
    return {key: value for key, value in PeftConfig.to_dict(config).items() if key not in FREE}


def same_bits(found: torch.Tensor, value: torch.Tensor) -> bool:
    if found.dtype != value.dtype or found.shape != value.shape:
        return False
    return torch.equal(found.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


def loaded(case: Case, wanted: dict[str, torch.Tensor]) -> str:
    """Load the adapter as it is now, onto a fresh model and in the place of an equal one."""
    fresh = base(FRESH[case.coding])
    before = copy.deepcopy(fresh.state_dict())
    try:
        model = PeftModel.from_pretrained(fresh, str(case.folder))
        model.load_adapter(str(case.folder), "default")
    except PemnError as error:
        same = equal(fresh.state_dict(), before)
        return type(error).__name__ if same else "WRONG: the refused load changed the model"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {str(error)[:80]}"
    return "equal" if equal(model.state_dict(), wanted) else "WRONG: another model"


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(wanted) and all(same_bits(found[k], v) for k, v in wanted.items())


def run(case: Case, judge: Callable[[], str], cases: int, end: float, rng: random.Random) -> Any:
    """Damage and judge; return counts by alteration and outcome, and the first of what is wrong."""
    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    for number in range(cases):
        state = rng.getrandbits(64)
        how = case.damage(random.Random(state))
        start = time.perf_counter()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            found = judge()
        except Hang:
            found = "WRONG: takes too long"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.perf_counter() - start)
        counts[how, found] += 1
        if found.startswith("WRONG") and len(wrong) < 20:
            wrong.append(f"case {number}, seed {state}, {how}: {found}")
        if time.perf_counter() > end:
            break
    by_kind: dict[str, dict[str, int]] = {}
    for (how, found), count in sorted(counts.items()):
        by_kind.setdefault(how, {})[found] = count
    return {
        "cases": counts.total(),
        "wrong": sum(count for (_, found), count in counts.items() if found.startswith("WRONG")),
        "first_wrong": wrong, "slowest_seconds": round(slowest, 3), "outcomes": by_kind,
    }  # fmt: skip


def limit_memory() -> None:
    """Let this process have no more than a fixed amount beyond what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=10_000, help="cases that are read")
    parser.add_argument("--loads", type=int, default=100, help="cases that are loaded in full")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--coding", default="context", choices=sorted(BANKS), help="of masks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    end = time.perf_counter() + arguments.seconds

    def too_long(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, too_long)
    with tempfile.TemporaryDirectory(prefix="pemn_fuzz_") as folder:
        case = Case(Path(folder), arguments.coding)
        rng = random.Random(arguments.seed)
        fresh = base(FRESH[arguments.coding])
        wanted = PeftModel.from_pretrained(fresh, folder).state_dict()
        limit_memory()
        result = {
            "coding": arguments.coding,
            "seed": arguments.seed,
            "read": run(case, case.outcome, arguments.files, end, rng),
            "loaded": run(case, lambda: loaded(case, wanted), arguments.loads, end, rng),
        }
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(f"{text}\n", encoding="utf-8")
    sys.stdout.write(f"{text}\n")
    return int(any(result[part]["wrong"] for part in ("read", "loaded")))


if __name__ == "__main__":
    raise SystemExit(main())

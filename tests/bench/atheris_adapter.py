"""Coverage-guided damage of adapter files, beside `tests.fuzz`; needs ``pip install atheris``.

    python -m tests.bench.atheris_adapter result.json context -max_total_time=3600

The second argument is the adapter's coding, "context" or "entropy". An input is one file of the
adapter: its first byte chooses which, the rest is the content. The corpus begins with the two whole
files, and half of all changes are those of `tests.fuzz`, half of these on a whole file. The first
outcome that is neither a named error nor the same adapter ends the run.
"""

import json
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import atheris

READERS = (
    "adapters.files.adapter_file",
    "adapters.config",
    "bits",
    "codec",
    "codes",
    "context",
    "buckets",
    "bucket_table",
    "entropy",
    "words",
    "symbols",
    "odds",
    "packed",
    "deflate",
)

with atheris.instrument_imports(include=[f"pemn_surgery.{name}" for name in READERS]):
    from tests.fuzz import CONFIG, ON_CONFIG, ON_WEIGHTS, WEIGHTS, Case

NAMES = (WEIGHTS, CONFIG)


class Target:
    """Judges inputs and writes from time to time what came out."""

    def __init__(self, case: Case, result: Path) -> None:
        self.case, self.result, self.start = case, result, time.time()
        self.counts: Counter[str] = Counter()

    def judge(self, content: bytes) -> None:
        chosen = NAMES[content[0] & 1] if content else WEIGHTS
        for name, whole in self.case.whole.items():
            (self.case.folder / name).write_bytes(content[1:] if name == chosen else whole)
        found = self.case.outcome()
        self.counts[found] += 1
        wrong = found.startswith("WRONG")
        if wrong or self.counts.total() % 500 == 0:
            seconds = round(time.time() - self.start)
            report = {"seconds": seconds, "cases": self.counts.total(), "outcomes": self.counts}
            self.result.write_text(f"{json.dumps(report, indent=1)}\n", encoding="utf-8")
        if wrong:
            raise RuntimeError(found)

    def mutate(self, content: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.25:
            number = rng.randrange(2)
            content = bytes([number]) + self.case.whole[NAMES[number]]
        if rng.random() < 0.5 and len(content) > 1:
            try:
                change = rng.choice((ON_WEIGHTS, ON_CONFIG)[content[0] & 1])
                return (content[:1] + change(content[1:], rng))[:size]
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                pass  # nothing to parse in there any more
        return atheris.Mutate(content, size)


def main() -> int:
    warnings.simplefilter("ignore")
    case = Case(Path(tempfile.mkdtemp(prefix="pemn_atheris_")), sys.argv[2])
    corpus = Path(tempfile.mkdtemp(prefix="pemn_corpus_"))
    for number, name in enumerate(NAMES):
        (corpus / name).write_bytes(bytes([number]) + case.whole[name])
    limits = ["-timeout=5", "-rss_limit_mb=3000", "-max_len=16000", "-len_control=0"]
    target = Target(case, Path(sys.argv[1]))
    atheris.Setup(
        [sys.argv[0], *sys.argv[3:], *limits, str(corpus)],
        target.judge,
        custom_mutator=target.mutate,
    )
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

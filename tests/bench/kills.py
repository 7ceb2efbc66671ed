"""Saves that die: by SIGKILL at random instants and at every file operation, for want of room, and
beside a second process that saves to the same place.

One process imports and builds two models; every trial is a fork of it, so that thousands are cheap.
After each the folder must hold one of the two adapters, whole: the weights byte for byte, and the
configuration that belongs to them.
"""

import argparse
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import AdapterWriteError

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
USERS = "tokenizer.json"  # a file of the user's own, which every save must leave alone
FAILED_BY_NAME, FAILED_OTHERWISE, WROTE = 40, 41, 0
NOBODY = 65534
WRITES = {"os.mkdir", "os.rename"}
REMOVES = {"os.remove", "os.rmdir"}


class Trials:
    """Two adapters that differ in masks, tensors and configuration, and a folder for them."""

    def __init__(self, folder: Path) -> None:
        self.models = [make(0, density=0.5), make(1, density=0.25, task_type="SEQ_CLS")]
        self.folder = folder / "place"
        self.expected = [self._save_alone(folder / str(i), m) for i, m in enumerate(self.models)]
        a, b = self.expected
        if a[0] == b[0] or a[1] == b[1]:
            raise SystemExit("the two adapters are alike: nothing could be seen")

    def begin(self) -> None:
        """Put the first adapter into an otherwise empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.folder.with_name("0"), self.folder)
        (self.folder / USERS).write_text("{}")

    def found(self) -> str:
        """Which adapter the folder holds."""
        state = read(self.folder)
        if state not in self.expected:
            return "neither"
        if (self.folder / USERS).read_text() != "{}":
            return "a user's file is gone"
        return "AB"[self.expected.index(state)]

    def is_mixed(self) -> bool:
        """Tell whether the two files are of different saves."""
        written = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        return written["digest"] != read(self.folder)[1]["digest"]

    def leftovers(self) -> list[str]:
        return sorted(
            {path.name for path in self.folder.iterdir()} - {WEIGHTS, CONFIG, CARD, USERS}
        )

    def load(self) -> None:
        """Load what is there in full; raises if that fails."""
        PeftModel.from_pretrained(base(2), str(self.folder))

    def _save_alone(self, folder: Path, model: PeftModel) -> tuple[bytes, dict[str, Any]]:
        model.save_pretrained(str(folder))
        return read(folder)


def base(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


def make(seed: int, **options: Any) -> PeftModel:
    model = pemnify(base(seed), bank="rp", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def read(folder: Path) -> tuple[bytes, dict[str, Any]]:
    config = PemnConfig.from_pretrained(str(folder))
    meaning = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    if config.file is None:
        raise SystemExit("the weights are gone")
    return (folder / WEIGHTS).read_bytes(), meaning


def fork(work: Callable[[], None]) -> int:
    """Run something in a child; return its process id."""
    child = os.fork()
    if child:
        return child
    code = FAILED_OTHERWISE
    try:
        work()
        code = WROTE
    except AdapterWriteError as error:
        code = FAILED_BY_NAME if error.__cause__ is not None else FAILED_OTHERWISE
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def join(child: int) -> int:
    """Wait for a child; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def random_kills(trials: Trials, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill a child that saves B, A, B, ... after a random time."""
    trials.begin()
    seconds = max(time_of_a_save(trials), 1e-3)
    found, most, mixed, loaded = Counter(), 0, 0, 0
    for number in range(kills):
        child = fork(lambda: save_for_ever(trials))
        time.sleep(rng.uniform(0, 2.5 * seconds))
        os.kill(child, signal.SIGKILL)
        found["ended by itself"] += join(child) != -signal.SIGKILL
        found[trials.found()] += 1
        mixed += trials.is_mixed()
        most = max(most, len(trials.leftovers()))
        if number % 20 == 0:
            trials.load()
            loaded += 1
    trials.models[0].save_pretrained(str(trials.folder))
    return {
        "kills": kills, "found": dict(found), "files_of_two_saves": mixed,
        "most_leftovers": most, "leftovers_at_the_end": trials.leftovers(), "loaded_whole": loaded,
        "seconds_a_save": round(seconds, 4),
    }  # fmt: skip


def time_of_a_save(trials: Trials) -> float:
    start = time.perf_counter()
    for _ in range(3):
        trials.models[0].save_pretrained(str(trials.folder))
    return (time.perf_counter() - start) / 3


def save_for_ever(trials: Trials) -> None:
    while True:
        for model in reversed(trials.models):
            model.save_pretrained(str(trials.folder))


def at_operation(number: int, folder: Path, events: set[str], act: Callable[[], None]) -> list[int]:
    """Act at one of this process's file operations within a folder, counted from 1.

    Opening to write is always one of them. Returns the place that they are counted in.
    """
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and set("wxa+") & set(str(arguments[1])):
            counts = str(arguments[0]).startswith(str(folder))
        else:  # what is removed has no more than its own name
            counts = event in events
        if counts:
            seen[0] += 1
            if seen[0] == number:
                act()

    sys.addaudithook(hook)
    return seen


def at_every_operation(trials: Trials, events: set[str], act: Callable[[], None]) -> dict[str, Any]:
    """Save B over A once for every file operation, and act at that one."""
    found, codes, mixed = Counter(), Counter(), 0
    for number in range(1, 1000):
        trials.begin()

        def save(number: int = number) -> None:
            seen = at_operation(number, trials.folder, events, act)
            trials.models[1].save_pretrained(str(trials.folder))
            if seen[0] < number:
                os._exit(99)

        code = join(fork(save))
        found[trials.found()] += 1
        if code == 99:
            break
        codes[code] += 1
        mixed += trials.is_mixed()
        if code != -signal.SIGKILL and trials.leftovers():
            found["leftovers after an error"] += 1
    return {
        "operations": number - 1, "found": dict(found), "files_of_two_saves": mixed,
        "ended": {str(code): count for code, count in codes.items()},
    }  # fmt: skip


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limited_sizes(trials: Trials) -> dict[str, Any]:
    """Let no file grow past a limit, from nothing to just below the weights' size."""
    trials.begin()
    size = (trials.folder / WEIGHTS).stat().st_size
    found, codes = Counter(), Counter()
    limits = [*range(0, size, max(size // 12, 1)), size - 400, size - 1]
    for limit in limits:

        def save(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            trials.models[1].save_pretrained(str(trials.folder))

        codes[join(fork(save))] += 1
        found[trials.found()] += 1
        found["leftovers after an error"] += len(trials.leftovers())
    return {
        "limits": len(limits), "found": {k: v for k, v in found.items() if v},
        "ended": {str(code): count for code, count in codes.items()},
    }  # fmt: skip


def read_only(trials: Trials) -> dict[str, Any]:
    """Save as a user that may read the folder, but not write to it."""
    trials.begin()
    trials.folder.parent.chmod(0o755)
    trials.folder.chmod(0o555)

    def save() -> None:
        if os.getuid() == 0:
            os.setuid(NOBODY)
        trials.models[1].save_pretrained(str(trials.folder))

    code = join(fork(save))
    trials.folder.chmod(0o755)
    return {"found": trials.found(), "ended": code, "leftovers": trials.leftovers()}


def two_processes(trials: Trials, saves: int) -> dict[str, Any]:
    """Two processes save different adapters to one place while this one reads."""
    trials.begin()

    def save(model: PeftModel) -> None:
        for _ in range(saves):
            model.save_pretrained(str(trials.folder))

    children = [fork(lambda model=model: save(model)) for model in trials.models]
    found: Counter[str] = Counter()
    while len(children) > sum(map(is_over, children)):
        file = PemnConfig.from_pretrained(str(trials.folder))
        ones = [count(state) for state in trials.expected]
        shown = (file.density, dict(file.file.ones) if file.file else {})
        found["AB"[ones.index(shown)] if shown in ones else "neither"] += 1
    codes = [join(child) for child in children]
    found_last = trials.found()
    trials.load()
    trials.models[0].save_pretrained(str(trials.folder))
    return {
        "saves": saves * len(children), "reads": dict(found), "ended": codes,
        "found": found_last, "leftovers_at_the_end": trials.leftovers(),
    }  # fmt: skip


def is_over(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def count(state: tuple[bytes, dict[str, Any]]) -> tuple[float, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / WEIGHTS).write_bytes(state[0])
        (Path(folder) / CONFIG).write_text(json.dumps(state[1]))
        config = PemnConfig.from_pretrained(folder)
    return config.density, dict(config.file.ones) if config.file else {}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m tests.bench.kills --kills 5000"
    )
    parser.add_argument("--kills", type=int, default=2000, help="random kills")
    parser.add_argument("--saves", type=int, default=100, help="saves of each of two processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on", type=Path, help="a folder of the file system to save to")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pemn_kills_", dir=arguments.on) as folder:
        trials = Trials(Path(folder))
        result = {
            "random_kills": random_kills(trials, arguments.kills, random.Random(arguments.seed)),
            "killed_at_every_operation": at_every_operation(trials, WRITES | REMOVES, killed),
            "no_room_at_every_operation": at_every_operation(trials, WRITES, no_room),
            "limited_sizes": limited_sizes(trials),
            "read_only": read_only(trials),
            "two_processes": two_processes(trials, arguments.saves),
        }
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(f"{text}\n", encoding="utf-8")
    sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

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
from peft import PeftModel, get_peft_model_state_dict
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
    if config.origin.file is None:
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
    """Kill a child after a random time that saves the adapter that is not there, again and again.

    The times grow while the old adapter is found and shrink while the new one is, so that on a
    busy machine, too, half of the kills come before a save is done.
    """
    trials.begin()
    found, most, mixed, loaded, window = Counter(), 0, 0, 0, time_of_a_save(trials)
    state = trials.found()
    for number in range(kills):
        new = trials.models["BA".index(state)]
        child = fork_that_saves(new, trials.folder)
        time.sleep(rng.uniform(0, window))
        os.kill(child, signal.SIGKILL)
        found["ended by itself"] += join(child) != -signal.SIGKILL
        before, state = state, trials.found()
        found[state] += 1
        found["old" if state == before else "new"] += 1
        window *= 1.1 if state == before else 1 / 1.1
        if state not in "AB":
            break
        mixed += trials.is_mixed()
        most = max(most, len(trials.leftovers()))
        if number % 20 == 0:
            trials.load()
            loaded += 1
    trials.models[0].save_pretrained(str(trials.folder))
    return {
        "kills": kills, "found": dict(found), "files_of_two_saves": mixed,
        "most_leftovers": most, "leftovers_at_the_end": trials.leftovers(), "loaded_whole": loaded,
    }  # fmt: skip


def time_of_a_save(trials: Trials) -> float:
    start = time.perf_counter()
    trials.models[0].save_pretrained(str(trials.folder))
    return time.perf_counter() - start


def fork_that_saves(model: PeftModel, folder: Path) -> int:
    """Return a child that saves for ever, once it has begun."""
    begun, begin = os.pipe()

    def save_for_ever() -> None:
        os.write(begin, b"!")
        while True:
            model.save_pretrained(str(folder))

    child = fork(save_for_ever)
    os.read(begun, 1)
    os.close(begun)
    os.close(begin)
    return child


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
    size = (trials.folder.with_name("1") / WEIGHTS).stat().st_size  # of those that are saved
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
    """Two processes save different adapters to one place while this one loads it, in every way."""
    expected = [loaded(trials.folder.with_name(str(number))) for number in range(2)]
    trials.begin()
    enough = trials.folder.with_name("enough")

    def save(model: PeftModel) -> None:
        number = 0
        while number < saves or not enough.exists():
            model.save_pretrained(str(trials.folder))
            number += 1

    children = [fork(lambda model=model: save(model)) for model in trials.models]
    found: Counter[str] = Counter()
    try:
        for _ in range(saves):
            for state in loaded(trials.folder):
                which = [state in states for states in expected]
                found["AB"[which.index(True)] if any(which) else "neither"] += 1
    finally:  # whatever a load raises, the two must end
        enough.touch()
        codes = [join(child) for child in children]
    found_last = trials.found()
    trials.load()
    trials.models[0].save_pretrained(str(trials.folder))
    return {
        "saves_at_least": saves * len(children), "loads": dict(found), "ended": codes,
        "found": found_last, "leftovers_at_the_end": trials.leftovers(),
    }  # fmt: skip


def loaded(folder: Path) -> list[tuple[Any, dict[str, bytes]]]:
    """Load an adapter onto a fresh model and beside it; return what of each is in force."""
    model = PeftModel.from_pretrained(base(2), str(folder))
    model.load_adapter(str(folder), "late")
    states = []
    for name in ("default", "late"):
        state = get_peft_model_state_dict(model, adapter_name=name)
        tensors = {key: value.numpy().tobytes() for key, value in state.items()}
        states.append((model.peft_config[name].density, tensors))
    return states


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m tests.bench.kills --kills 5000"
    )
    parser.add_argument("--kills", type=int, default=2000, help="random kills")
    parser.add_argument("--saves", type=int, default=100, help="saves and loads beside each other")
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

"""Several threads use one model: a call gets what it asked for, or what was active at its start."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pemn_surgery import PemnConfig, infer_task, pemnify
from tests.adapters import models

TASKS = ["a", "b", "c"]


def with_tasks(model, **options):
    model = pemnify(model, adapter_name="a", seed=0, **options)
    for name in TASKS[1:]:
        model.add_adapter(name, PemnConfig(seed=0, **options))
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
            parameter.add_(noise, alpha=0.2)
    return model.eval()


def net():
    return with_tasks(models.net(), bank="rp", ratio=0.1, modules_to_save=["head"])


def llama():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = LlamaForCausalLM(config)
    return with_tasks(base, bank="own", selector="threshold")


def alone(model, call):
    """What each task answers where it is the only one to run."""
    found = {}
    for name in TASKS:
        model.set_adapter(name)
        found[name] = call(model)
    model.set_adapter("a")
    with model.disable_adapter():
        found["__base__"] = call(model)
    first = found["a"]
    assert all(not torch.equal(first, other) for n, other in found.items() if n != "a")
    return found


def together(*works):
    """Run functions in threads of their own that start at once; raise what they raise."""
    start = threading.Barrier(len(works))

    def begin(work):
        torch.set_num_threads(1)
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(begin, work) for work in works]]


def requests(model, expected, call, count, seed):
    """Ask for mixed batches; return how many of their samples are wrong."""
    generator = torch.Generator().manual_seed(seed)
    known = [*TASKS, "__base__"]
    wrong = 0
    for _ in range(count):
        names = [known[int(i)] for i in torch.randint(len(known), (4,), generator=generator)]
        answers = call(model, names)
        rights = [expected[name][row] for row, name in enumerate(names)]
        wrong += sum(not torch.equal(a, b) for a, b in zip(answers, rights, strict=True))
    return wrong


@torch.no_grad()
def forward(model, names=None):
    # A sample at a time: a product's last bits depend on the number of its rows.
    rows = models.images(7, 4).split(1)
    if names is None:
        return torch.cat([model(row) for row in rows])
    return torch.cat([model(row, adapter_names=[n]) for row, n in zip(rows, names, strict=True)])


@torch.no_grad()
def batched(model, names):
    return model(models.images(7, 4), adapter_names=names)


@torch.no_grad()
def generate(model, names=None):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if names is not None:
        options["adapter_names"] = names
    return model.generate(input_ids=models.tokens(5, 4), **options)


def test_mixed_batches_in_two_threads():
    model = net()
    expected = alone(model, forward)
    before = dict(model.get_base_model().__dict__)
    wrong = together(
        *(lambda seed=seed: requests(model, expected, forward, 50, seed) for seed in range(2))
    )
    assert wrong == [0, 0]
    assert model.get_base_model().__dict__.keys() == before.keys()
    models.assert_equal(forward(model), expected["a"])


def test_two_hundred_mixed_requests_in_each_of_two_threads():
    model = net()
    expected = alone(model, forward)

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        worst = 0.0
        for _ in range(200):
            picks = torch.randint(len(TASKS), (4,), generator=generator)
            names = [TASKS[int(pick)] for pick in picks]
            rights = torch.stack([expected[name][row] for row, name in enumerate(names)])
            worst = max(worst, float((batched(model, names) - rights).abs().max()))
        return worst

    apart = min(float((expected["a"] - expected[name]).abs().max()) for name in ["b", "c"])
    assert apart > 1e-2
    assert max(together(lambda: work(1), lambda: work(2))) < 1e-5


def test_a_third_thread_switches():
    """Calls that name nothing see one adapter for their whole length, whichever."""
    model = net()
    expected = alone(model, forward)
    stop = threading.Event()

    @torch.no_grad()
    def asks():
        strange = 0
        for _ in range(200):
            answer = model(models.images(7, 4)[:1])
            strange += not any(torch.equal(answer, expected[name][:1]) for name in TASKS)
        stop.set()
        return strange

    def switches():
        count = 0
        while not stop.is_set():
            model.set_adapter(TASKS[count % 3])
            count += 1
        return count

    def mixes():
        return requests(model, expected, forward, 25, 3)

    strange, wrong, count = together(asks, mixes, switches)
    assert (strange, wrong) == (0, 0)
    assert count > 2  # it did switch; how often is the scheduler's affair


def test_a_call_goes_on_with_what_was_active_when_it_began():
    model = net()
    expected = alone(model, forward)
    inside, switched = threading.Event(), threading.Event()

    def pause(*_):
        inside.set()
        assert switched.wait(30)

    hook = model.get_base_model().conv2.register_forward_hook(pause)

    @torch.no_grad()
    def call():
        return model(models.images(7, 4)[:1])

    def switch():
        assert inside.wait(30)
        model.merge_adapter()
        model.unmerge_adapter()
        model.set_adapter("b")
        switched.set()

    answer, _ = together(call, switch)
    hook.remove()
    models.assert_equal(answer, expected["a"][:1])
    models.assert_equal(forward(model), expected["b"])


def test_generation_in_two_threads():
    model = llama()
    expected = alone(model, generate)

    def work(seed):
        return requests(model, expected, generate, 6, seed)

    assert together(lambda: work(1), lambda: work(2)) == [0, 0]


@pytest.mark.parametrize("method", ["one_shot", "statistics"])
def test_inferring_the_task_beside_calls(method):
    model = net()
    expected = alone(model, forward)
    guess = infer_task(model, models.images(7, 4), method=method)

    def infers():
        return {infer_task(model, models.images(7, 4), method=method).name for _ in range(15)}

    @torch.no_grad()
    def asks():
        rows = [model(models.images(7, 4)[:1]) for _ in range(60)]
        return sum(not torch.equal(row, expected["a"][:1]) for row in rows)

    assert together(infers, asks) == [{guess.name}, 0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_after_mixed_batches(copied):
    model = net()
    expected = alone(model, forward)
    batched(model, ["a", "b", "c", "a"])
    models.assert_equal(forward(copied(model)), expected["a"])


class Outer(nn.Module):
    """A model that calls another one with masks, as a distillation's student does its teacher."""

    def __init__(self, inner):
        super().__init__()
        self.inner = [inner]
        self.body = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.inner[0](self.body(x))


def test_another_model_within_a_mixed_batch_runs_as_it_is():
    teacher = net()
    student = with_tasks(Outer(teacher.get_base_model()), bank="rp", ratio=1.0)
    x = models.images(7, 2)
    with torch.no_grad():
        teacher.set_adapter("b")
        student.set_adapter("c")
        expected = student(x)
        mixed = student(x, adapter_names=["c", "c"])
    torch.testing.assert_close(mixed, expected)

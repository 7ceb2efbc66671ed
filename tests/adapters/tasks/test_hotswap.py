"""PEFT's hot-swapping: another task's masks in place, in a compiled model without recompiling."""

import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

from pemn_surgery import pemnify
from pemn_surgery.errors import (
    ArchitectureError,
    FingerprintError,
    MaskFormatError,
    UnsupportedModelError,
)
from tests.adapters import models

KINDS = {
    "rp": {"bank": "rp"},
    "own_scaled": {"bank": "own", "selector": "threshold", "scale": "sqrt_density"},
    "head_saved_whole": {"bank": "own", "selector": "topk", "modules_to_save": ["head"]},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folders and logits of three tasks of every kind."""
    made = {}
    for kind, options in KINDS.items():
        for task in (1, 2, 3):
            folder = tmp_path_factory.mktemp(f"{kind}{task}")
            model = models.train(pemnify(models.net(), **options), task)
            model.save_pretrained(str(folder))
            made[kind, task] = folder, models.logits(model), models.masks(model)
    return made


def load(folder, **options):
    return PeftModel.from_pretrained(models.net(), str(folder), **options).eval()


def swap(model, folder, name="default"):
    hotswap_adapter(model, str(folder), name, torch_device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_tasks_outputs_in_the_same_tensors(kind, tasks):
    model = load(tasks[kind, 1][0])
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert len(places) > 20
    models.assert_equal(models.logits(model), tasks[kind, 1][1])
    for task in (2, 3, 1):
        swap(model, tasks[kind, task][0])
        models.assert_equal(models.logits(model), tasks[kind, task][1], f"task {task}")
        models.assert_same_tensors(models.masks(model), tasks[kind, task][2])
    models.assert_differs(tasks[kind, 1][1], tasks[kind, 2][1])
    now = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert now == places


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torch.compile", "model.compile"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_compiled_once(kind, way, tasks):
    torch._dynamo.reset()
    counters.clear()
    model = load(tasks[kind, 1][0])
    prepare_model_for_compiled_hotswap(model)
    called = model
    if way == "torch.compile":
        called = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        model.compile(backend="aot_eager", fullgraph=True)
    x = models.images(99)
    with torch.no_grad(), dynamo_config.patch(error_on_recompile=True):
        torch.testing.assert_close(called(x), tasks[kind, 1][1])
        for task in (2, 3, 1):
            swap(called, tasks[kind, task][0])
            torch.testing.assert_close(called(x), tasks[kind, task][1])
    assert not torch.allclose(tasks[kind, 1][1], tasks[kind, 2][1])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_inductor_too(tasks):
    torch._dynamo.reset()
    model = torch.compile(load(tasks["rp", 1][0]))
    with torch.no_grad(), dynamo_config.patch(error_on_recompile=True):
        model(models.images(99))
        swap(model, tasks["rp", 2][0])
        torch.testing.assert_close(model(models.images(99)), tasks["rp", 2][1])


def test_one_of_two_adapters(tasks):
    model = load(tasks["rp", 1][0])
    model.load_adapter(str(tasks["rp", 2][0]), "second")
    model.set_adapter("second")
    swap(model, tasks["rp", 3][0], "second")
    models.assert_equal(models.logits(model), tasks["rp", 3][1])
    model.set_adapter("default")
    models.assert_equal(models.logits(model), tasks["rp", 1][1])


def test_what_is_saved_after_a_swap_is_the_new_task(tasks, tmp_path):
    model = load(tasks["rp", 1][0])
    swap(model, tasks["rp", 2][0])
    model.save_pretrained(str(tmp_path))
    models.assert_same_tensors(
        load_file(tmp_path / models.WEIGHTS_FILE),
        load_file(tasks["rp", 2][0] / models.WEIGHTS_FILE),
    )


@pytest.mark.parametrize("kind", ["rp", "own_scaled"])
def test_scores_that_train_are_swapped_and_train_on(kind, tasks):
    model = models.train(pemnify(models.net(), **KINDS[kind]), 1)
    scores = [layer.mask_of("default").scores for layer in models.mask_layers(model).values()]
    with pytest.warns(UserWarning, match="holds bits, not scores, for 4 masks"):
        swap(model, tasks[kind, 2][0])
    models.assert_same_tensors(models.masks(model), tasks[kind, 2][2])
    models.assert_equal(models.logits(model), tasks[kind, 2][1])
    layers = models.mask_layers(model).values()
    for layer, before in zip(layers, scores, strict=True):
        assert layer.mask_of("default").scores is before
        assert before.requires_grad
    models.train(model, 2)
    models.assert_differs(models.logits(model), tasks[kind, 2][1])


def test_a_checkpoint_of_scores_into_bits(tasks, tmp_path):
    other = models.train(pemnify(models.net(), bank="rp"), 5)
    other.peft_config["default"].keep_scores = True
    other.save_pretrained(str(tmp_path))
    model = load(tasks["rp", 1][0])
    swap(model, tmp_path)
    models.assert_equal(models.logits(model), models.logits(other))


def damaged(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "damaged")
    path = tmp_path / "damaged" / models.WEIGHTS_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    models.forget_digest(path.parent)
    return tmp_path / "damaged"


CONV = "base_model.model.conv1.masked_weight.pemn_masks.bits"
MEAN = "base_model.model.bn1.task_tensors.pemn_tensors.running_mean"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: t[CONV][40:41].add_(1), MaskFormatError, "checksum"),
        (lambda t: t.pop(CONV), ArchitectureError, "conv1.masked_weight.pemn_masks: file none"),
        (lambda t: t.pop(MEAN), ArchitectureError, "running_mean: file none, model float (8,)"),
        (lambda t: t.update(x=torch.zeros(1)), ArchitectureError, "x: file float (1,), model none"),
        (lambda t: t.update({MEAN: torch.zeros(9)}), ArchitectureError, "file float (9,)"),
        (
            lambda t: t.update({CONV: t[CONV.replace("conv1", "conv2")].clone()}),
            ArchitectureError,
            "masks 576 weights",
        ),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(change, error, said, tasks, tmp_path):
    folder = damaged(tasks["rp", 2][0], tmp_path, change)
    model = load(tasks["rp", 1][0])
    before = models.Snapshot(model)
    with pytest.raises(error) as raised:
        swap(model, folder)
    models.says(raised, said)
    before.assert_unchanged()


def other_base(tmp_path, **options):
    model = pemnify(models.net(seed=8), **options)
    model.save_pretrained(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("rp", {"bank": "rp", "seed": 1}),
        ("rp", {"bank": "rp", "ratio": 0.5}),
        ("own_scaled", KINDS["own_scaled"]),
    ],
)
def test_masks_of_another_base_change_nothing(kind, options, tasks, tmp_path):
    model = load(tasks[kind, 1][0])
    before = models.Snapshot(model)
    with pytest.raises(FingerprintError, match="trained on a base with fingerprint"):
        swap(model, other_base(tmp_path, **options))
    before.assert_unchanged()


@pytest.mark.parametrize(
    "options", [{"density": 0.3}, {"selector": "threshold"}, {"scale": "sqrt_density"}]
)
def test_a_configuration_that_means_other_outputs_changes_nothing(options, tasks, tmp_path):
    model = load(tasks["rp", 1][0])
    before = models.Snapshot(model)
    with pytest.raises(ValueError, match=f"incompatible: for {next(iter(options))}"):
        swap(model, other_base(tmp_path, bank="rp", **options))
    before.assert_unchanged()


def test_merged_masks_are_not_swapped(tasks):
    model = load(tasks["rp", 1][0])
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match=r"'default' is merged in 9 layers"):
        swap(model, tasks["rp", 2][0])
    models.assert_equal(models.logits(model), tasks["rp", 1][1])
    model.unmerge_adapter()
    swap(model, tasks["rp", 2][0])
    models.assert_equal(models.logits(model), tasks["rp", 2][1])


def test_masks_and_lora_are_not_swapped_for_each_other(tasks, tmp_path):
    lora = get_peft_model(models.net(), LoraConfig(target_modules=["head"], r=2))
    lora.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and PEMN"):
        swap(lora, tasks["rp", 1][0])
    with pytest.raises(ValueError, match="Incompatible PEFT types found: PEMN and LORA"):
        swap(load(tasks["rp", 1][0]), tmp_path)


def test_lora_is_swapped_as_before(tmp_path):
    def lora(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            options = LoraConfig(target_modules=["head"], r=2, init_lora_weights=False)
            return get_peft_model(models.net(), options).eval()

    first, second = lora(1), lora(2)
    second.save_pretrained(str(tmp_path))
    prepare_model_for_compiled_hotswap(first)
    models.assert_differs(models.logits(first), models.logits(second))
    swap(first, tmp_path)
    models.assert_equal(models.logits(first), models.logits(second))
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(models.net())


def test_swapping_in_inference_mode(tasks):
    with torch.inference_mode():
        model = load(tasks["rp", 1][0])
        first = model(models.images(99)).clone()
        swap(model, tasks["rp", 2][0])
        second = model(models.images(99)).clone()
    models.assert_equal(first, tasks["rp", 1][1])
    models.assert_equal(second, tasks["rp", 2][1])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        swap(model, tasks["rp", 3][0])
        models.assert_equal(model(models.images(99)).clone(), tasks["rp", 3][1])

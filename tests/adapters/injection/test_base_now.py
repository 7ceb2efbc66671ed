"""What is saved names the base as it is then, and every way in asks for that base."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.adapters.base import fingerprint_now
from pemn_surgery.errors import FingerprintError, MaskFormatError, PemnWarning
from tests.adapters import models

SCORES = "a checkpoint's scores"
KINDS = ["bits", SCORES]
every_kind = pytest.mark.parametrize("kind", KINDS)


def load_late(model):
    """Pretrained weights come after the masks."""
    model.get_base_model().load_state_dict(models.net(5).state_dict(), strict=False)


def train_jointly(model):
    """Base and scores learn together."""
    model.requires_grad_(True)
    models.train(model, steps=3)


def edit(model):
    """One convolution is edited through ``.data``, which no version counter sees."""
    weight = models.mask_layers(model)["conv2.weight"].own_weight()
    version = weight._version
    weight.data.mul_(-2)
    assert weight._version == version


def turn_one(model):
    with torch.no_grad():
        models.mask_layers(model)["head.weight"].own_weight()[1, 3] *= 1 + 2**-20


CHANGES = {c.__name__: c for c in (load_late, train_jointly, edit, turn_one)}
every_change = pytest.mark.parametrize("change", list(CHANGES))


def save(model, folder, kind="bits"):
    model.peft_config["default"].keep_scores = kind == SCORES
    model.save_pretrained(str(folder))
    model.peft_config["default"].keep_scores = False


def base_of(model):
    """The base as a user keeps it: unloaded from a copy."""
    return copy.deepcopy(model).unload()


@pytest.fixture(params=list(CHANGES))
def changed(request):
    model = models.train(pemnify(models.net(), bank="own", selector="topk"))
    CHANGES[request.param](model)
    return models.train(model)


@every_kind
def test_saved_on_a_changed_base(changed, kind, tmp_path):
    """The right base takes the adapter, to the last bit; the one it had at first refuses it."""
    save(changed, tmp_path, kind)
    again = PeftModel.from_pretrained(base_of(changed), str(tmp_path))
    models.assert_equal(models.logits(again), models.logits(changed))
    wrong = models.net()
    before = models.Snapshot(wrong)
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(wrong, str(tmp_path))
    before.assert_unchanged()


def test_every_mask_in_the_file_names_the_changed_base(changed, tmp_path):
    """So that masks alone are refused, too, with no configuration beside them."""
    save(changed, tmp_path)
    state = load_file(tmp_path / models.WEIGHTS_FILE)
    model = pemnify(models.net(), bank="own", selector="topk")
    with pytest.raises(FingerprintError):
        set_peft_model_state_dict(model, state)
    right = pemnify(base_of(changed), bank="own", selector="topk")
    with pytest.warns(UserWarning, match="bits, not scores"):
        set_peft_model_state_dict(right, state)
    models.assert_same_tensors(models.masks(right), models.masks(changed))


@every_change
def test_loaded_bits_are_saved_with_the_base_that_they_lie_on_now(change, tmp_path):
    """An adapter of bits whose base changes afterwards: headers and configuration agree."""
    models.train(pemnify(models.net(), bank="own", selector="topk")).save_pretrained(
        str(tmp_path / "first")
    )
    model = PeftModel.from_pretrained(models.net(), str(tmp_path / "first"))
    CHANGES[change](model)
    model.save_pretrained(str(tmp_path / "second"))
    again = PeftModel.from_pretrained(base_of(model), str(tmp_path / "second"))
    models.assert_equal(models.logits(again), models.logits(model))
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(models.net(), str(tmp_path / "second"))
    wrong = pemnify(models.net(), bank="own", selector="topk")
    with pytest.raises(FingerprintError):
        set_peft_model_state_dict(wrong, get_peft_model_state_dict(model))


def test_an_unchanged_base_is_saved_to_the_same_bytes(tmp_path):
    model = models.train(pemnify(models.net(), bank="own", selector="topk"))
    for name in ("a", "b"):
        model.save_pretrained(str(tmp_path / name))
    PeftModel.from_pretrained(models.net(), str(tmp_path / "a")).save_pretrained(
        str(tmp_path / "c")
    )
    files = [load_file(tmp_path / name / models.WEIGHTS_FILE) for name in "abc"]
    models.assert_same_tensors(files[1], files[0])
    models.assert_same_tensors(files[2], files[0])


def test_a_second_adapter_is_asked_for_the_base_as_it_is(changed, tmp_path):
    save(changed, tmp_path / "new")
    save(pemnify(models.net(), bank="own", selector="topk"), tmp_path / "old")
    changed.load_adapter(str(tmp_path / "new"), "same")
    models.assert_same_tensors(models.masks(changed, "same"), models.masks(changed))
    before = models.Snapshot(changed)
    with pytest.raises(FingerprintError):
        changed.load_adapter(str(tmp_path / "old"), "other")
    before.assert_unchanged()


# Ways in. Each takes a model, the folder of an adapter, and puts that in the place of "default".


def by_load_adapter(model, folder):
    model.load_adapter(folder, "default")


def as_trainer_resumes(model, folder):
    model.load_adapter(folder, "default", is_trainable=True)


def by_state_dict(model, folder):
    set_peft_model_state_dict(model, load_file(f"{folder}/{models.WEIGHTS_FILE}"))


def by_hotswap(model, folder):
    hotswap_adapter(model, folder, "default")


DOORS = {d.__name__: d for d in (by_load_adapter, as_trainer_resumes, by_state_dict, by_hotswap)}
every_door = pytest.mark.parametrize("door", list(DOORS))
OTHERS = {
    "another base": (
        (0, {"bank": "own", "selector": "topk"}),
        (1, {"bank": "own", "selector": "topk"}),
    ),
    "another seed": ((0, {"bank": "rp", "seed": 0}), (0, {"bank": "rp", "seed": 1})),
    "another base in the bank": (
        (0, {"bank": "mp", "bank_init": "model"}),
        (1, {"bank": "mp", "bank_init": "model"}),
    ),
}


@every_kind
@every_door
@pytest.mark.parametrize("other", list(OTHERS))
def test_every_way_in_refuses_masks_of(other, door, kind, tmp_path):
    (seed, options), (other_seed, other_options) = OTHERS[other]
    save(models.train(pemnify(models.net(other_seed), **other_options)), tmp_path, kind)
    model = models.train(pemnify(models.net(seed), **options))
    before = models.Snapshot(model)
    with pytest.raises(FingerprintError, match=r"fingerprint [0-9a-f]{8}.*Nothing was changed"):
        DOORS[door](model, str(tmp_path))
    before.assert_unchanged()


@every_kind
@every_door
@pytest.mark.filterwarnings("ignore:The file holds bits")
def test_every_way_in_takes_masks_of_its_base(door, kind, tmp_path):
    trained = models.train(pemnify(models.net(), bank="own", selector="topk"))
    save(trained, tmp_path, kind)
    model = models.train(pemnify(models.net(), bank="own", selector="topk"), task=1)
    DOORS[door](model, str(tmp_path))
    models.assert_same_tensors(models.masks(model), models.masks(trained))
    if kind == SCORES:
        wanted = {n: v for n, v in trained.state_dict().items() if n.endswith(".scores")}
        models.assert_same_tensors({n: model.state_dict()[n] for n in wanted}, wanted)


@every_change
@every_kind
@every_door
@pytest.mark.filterwarnings("ignore:The file holds bits")
def test_every_way_in_asks_for_the_base_as_it_is(door, kind, change, tmp_path):
    model = pemnify(models.net(), bank="own", selector="topk")
    save(model, tmp_path / "old", kind)
    CHANGES[change](model)
    save(model, tmp_path / "new", kind)
    before = models.Snapshot(model)
    with pytest.raises(FingerprintError):
        DOORS[door](model, str(tmp_path / "old"))
    before.assert_unchanged()
    DOORS[door](model, str(tmp_path / "new"))


def test_scores_that_say_no_base_are_taken_with_a_warning(tmp_path):
    """Hand-made ones, or those of early versions."""
    trained = models.train(pemnify(models.net(1), bank="own", selector="topk"))
    state = {
        name.replace(".default", ""): value.clone()
        for name, value in trained.state_dict().items()
        if "pemn_" in name
    }
    model = pemnify(models.net(0), bank="own", selector="topk")
    with pytest.warns(PemnWarning, match=r"4 masks' scores do not say on which base"):
        set_peft_model_state_dict(model, state)
    models.assert_same_tensors(models.masks(model), models.masks(trained))


@pytest.mark.parametrize("damage", [lambda v: v[:5], lambda v: v.float()])
def test_a_base_that_is_no_fingerprint_is_refused_by_name(damage, tmp_path):
    save(models.train(pemnify(models.net(), bank="own", selector="topk")), tmp_path, SCORES)
    state = load_file(tmp_path / models.WEIGHTS_FILE)
    key = next(key for key in state if key.endswith("conv2.masked_weight.pemn_masks.fingerprint"))
    assert state[key].dtype == torch.uint8
    assert tuple(state[key].shape) == (12,)
    state[key] = damage(state[key])
    model = pemnify(models.net(), bank="own", selector="topk")
    before = models.Snapshot(model)
    with pytest.raises(MaskFormatError, match=r"conv2.*fingerprint.*12 bytes"):
        set_peft_model_state_dict(model, state)
    before.assert_unchanged()
    save_file(state, tmp_path / models.WEIGHTS_FILE)
    models.forget_digest(tmp_path)
    with pytest.raises(MaskFormatError, match=r"conv2.*fingerprint.*12 bytes"):
        model.load_adapter(str(tmp_path), "default")
    before.assert_unchanged()


@pytest.mark.parametrize("init", ["signed_constant", "kaiming_normal"])
def test_drawn_weights_that_were_trained_are_no_longer_the_seeds(init, tmp_path):
    """No seed draws them again, so nothing takes the adapter for one of the seed's."""
    model = models.train(pemnify(models.net(), bank="own", bank_init=init))
    save(model, tmp_path / "before")
    train_jointly(model)
    with pytest.warns(
        PemnWarning, match=r"4 of 4 weights .* are no longer those that seed 0 draws"
    ):
        save(model, tmp_path / "after")
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(models.net(), str(tmp_path / "after"))
    with pytest.raises(FingerprintError):
        model.load_adapter(str(tmp_path / "before"), "default")


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_drawn_weights_that_were_cast_are_still_the_seeds(cast, tmp_path):
    model = models.train(pemnify(models.net(), bank="own", bank_init="kaiming_normal"))
    expected = models.masks(model)
    getattr(model, cast)().float()
    save(model, tmp_path)
    again = PeftModel.from_pretrained(models.net(1), str(tmp_path))
    models.assert_same_tensors(models.masks(again), expected)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
@every_kind
def test_a_cast_base_is_still_known_in_every_type(cast, kind, tmp_path):
    """It is the rounded one; what is known of it in wider types stays said."""
    model = models.train(pemnify(models.net(), bank="own", selector="topk"))
    save(model, tmp_path / "float32", kind)
    whole = dict(model.peft_config["default"].fingerprint)
    save(getattr(model, cast)(), tmp_path / cast, kind)
    assert model.peft_config["default"].fingerprint == whole
    PeftModel.from_pretrained(models.net(), str(tmp_path / cast))
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(models.net(1), str(tmp_path / cast))


def test_an_offloaded_base_is_read_where_it_lies():
    """Its weights are on meta between calls, and stay there."""
    model = pemnify(models.net(), bank="own", selector="topk")
    start = fingerprint_now(model, "default")
    edit(model)
    expected = fingerprint_now(model, "default")
    assert expected != start
    cpu_offload(model, torch.device("cpu"))
    assert fingerprint_now(model, "default") == expected
    assert all(p.is_meta for p in model.parameters())


def test_masks_onto_an_offloaded_base_are_checked(tmp_path):
    save(models.train(pemnify(models.net(), bank="own", selector="topk")), tmp_path)
    wrong = models.net(1)
    cpu_offload(wrong, torch.device("cpu"))
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(wrong, str(tmp_path))
    right = models.net()
    cpu_offload(right, torch.device("cpu"))
    model = PeftModel.from_pretrained(right, str(tmp_path))
    assert fingerprint_now(model, "default") == model.peft_config["default"].origin.fingerprint
    expected = models.logits(PeftModel.from_pretrained(models.net(), str(tmp_path)))
    models.assert_equal(models.logits(model), expected)


def test_gathered_values_are_taken_from_the_given_state_dict(tmp_path):
    """As FSDP and ZeRO pass them, while the modules hold parts."""
    model = models.train(pemnify(models.net(), bank="own", selector="topk"))
    edit(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    right = base_of(model)
    for layer in models.mask_layers(model).values():
        layer.own_weight().data = torch.empty(0)  # what ZeRO-3 leaves of a parameter
    model.save_pretrained(str(tmp_path / "gathered"), state_dict=state)
    PeftModel.from_pretrained(right, str(tmp_path / "gathered"))
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(models.net(), str(tmp_path / "gathered"))


def test_values_that_nobody_has_leave_what_was_known(tmp_path):
    """ZeRO-3 leaves frozen parameters out of what it gathers."""
    model = models.train(pemnify(models.net(), bank="own", selector="topk"))
    state = {name: value.clone() for name, value in model.state_dict().items() if "pemn" in name}
    for layer in models.mask_layers(model).values():
        layer.own_weight().data = torch.empty(0)
    model.save_pretrained(str(tmp_path), state_dict=state)
    PeftModel.from_pretrained(models.net(), str(tmp_path))
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(models.net(1), str(tmp_path))


# transformers' own ways in.


def bert_with(seed=0, kind="bits", folder=None, **options):
    model = models.bert(seed)
    model.add_adapter(PemnConfig(bank="own", **options))
    generator = torch.Generator().manual_seed(1)
    for layer in models.mask_layers(model).values():
        scores = layer.mask_of("default").scores
        scores.data = torch.randn(scores.shape, generator=generator)
    if folder is not None:
        model.peft_config["default"].keep_scores = kind == SCORES
        model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("is_trainable", [False, True])
@every_kind
@pytest.mark.filterwarnings("ignore:The file holds bits")
def test_transformers_load_adapter(kind, is_trainable, tmp_path):
    """What it holds does not depend on whether scores or bits were asked for."""
    trained = bert_with(kind=kind, folder=tmp_path)
    model = models.bert()
    model.load_adapter(str(tmp_path), is_trainable=is_trainable)
    models.assert_same_tensors(models.masks(model), models.masks(trained))
    trains = {p.requires_grad for n, p in model.named_parameters() if n.endswith(".scores")}
    assert trains == ({is_trainable} if is_trainable or kind == SCORES else set())
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=models.tokens()).logits for m in (model, trained))
    models.assert_equal(found, expected)
    wrong = models.bert(1)
    with pytest.raises(FingerprintError):
        wrong.load_adapter(str(tmp_path), is_trainable=is_trainable)

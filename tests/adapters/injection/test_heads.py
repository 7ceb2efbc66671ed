"""Heads that no checkpoint brings: trained and saved whole, or named in a warning.

Every situation is walked as its users walk it: train, save, build again with another random head
(as another process would), load, compare logits.
"""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from pemn_surgery import PemnConfig, from_finetuned, pemnify, plan
from pemn_surgery.adapters.injection.heads import new_parts
from pemn_surgery.adapters.state import AdapterEntries
from pemn_surgery.errors import ArchitectureError, FingerprintError, HeadWarning, MixedBatchError
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

VIT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 16,
}  # fmt: skip


class CrossEncoder(nn.Module):
    """As sentence-transformers' class of that name: a sequence classifier in another module."""

    def __init__(self, checkpoint, labels):
        super().__init__()
        kind = transformers.AutoModelForSequenceClassification
        self.model = kind.from_pretrained(checkpoint, num_labels=labels)

    def forward(self, tokens):
        return self.model(input_ids=tokens).logits


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of pretrained models, by what they are."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    made = {
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=5)),
        "timm": transformers.TimmWrapperForImageClassification(
            transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=5)
        ),
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        "distilbert": transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(
                vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3
            )
        ),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


def image_classifier(checkpoint, seed, **options):
    torch.manual_seed(seed)
    options = {"num_labels": 7, "ignore_mismatched_sizes": True, **options}
    kind = transformers.AutoModelForImageClassification
    return kind.from_pretrained(checkpoint, **options).eval()


def cross_encoder(checkpoint, seed, labels=3):
    torch.manual_seed(seed)
    return CrossEncoder(checkpoint, labels).eval()


def pictures(size=16, count=4):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def answers(model, x):
    with torch.no_grad():
        found = model.eval()(x)
    return found.logits if hasattr(found, "logits") else found


def trained(model, x, steps=3):
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        found = model(x)
        logits = found.logits if hasattr(found, "logits") else found
        F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1]).backward()
        optimizer.step()
    return model.eval()


def walk(build, x, folder, **options):
    """Train and save on one build, load on another whose new layers differ; return the first."""
    model = trained(pemnify(build(1), bank="own", selector="threshold", **options), x)
    model.save_pretrained(str(folder))
    other = build(2)
    assert not torch.equal(answers(build(1), x), answers(other, x)), "the builds must differ"
    again = PeftModel.from_pretrained(other, str(folder))
    models.assert_equal(answers(again, x), answers(model, x))
    return model


def saved_whole(model):
    return model.peft_config["default"].modules_to_save


# -- what a checkpoint lacks ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), [("vit", "classifier"), ("timm", "timm_model.fc")])
def test_a_mismatched_head_is_trained_and_saved_whole(name, head, checkpoints, tmp_path):
    x = pictures(16 if name == "vit" else 32)
    start = image_classifier(checkpoints[name], 1)
    before = start.get_submodule(head).weight.detach().clone()
    model = walk(lambda seed: image_classifier(checkpoints[name], seed), x, tmp_path)
    assert saved_whole(model) == [head]
    tensors = load_file(tmp_path / models.WEIGHTS_FILE)
    kept = tensors[f"base_model.model.{head}.weight"]
    assert kept.shape[0] == 7
    assert not torch.equal(kept, before), "it was trained"
    assert not any(f"{head}.masked" in key for key in tensors)


def test_a_cross_encoder_keeps_its_head_and_its_pooler(checkpoints, tmp_path):
    """A masked language model's checkpoint lacks both."""
    model = walk(lambda seed: cross_encoder(checkpoints["bert"], seed), models.tokens(), tmp_path)
    assert saved_whole(model) == ["model.bert.pooler", "model.classifier"]


def test_a_sequence_classifier_without_task_type(checkpoints, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        kind = transformers.AutoModelForSequenceClassification
        return kind.from_pretrained(checkpoints["bert"], num_labels=3).eval()

    model = walk(build, models.tokens(), tmp_path)
    assert saved_whole(model) == ["bert.pooler", "classifier"]


def test_task_type_and_checkpoint_name_each_module_once(checkpoints, tmp_path):
    model = walk(
        lambda seed: cross_encoder(checkpoints["bert"], seed).model, models.tokens(), tmp_path,
        task_type="SEQ_CLS",
    )  # fmt: skip
    assert saved_whole(model) == ["classifier", "score", "bert.pooler"]


def test_chosen_targets_leave_a_new_head_trained_and_saved(checkpoints, tmp_path):
    """LoRA leaves it random and frozen, and gives other logits in the next process."""
    x, build = pictures(), lambda seed: image_classifier(checkpoints["vit"], seed)
    lora = get_peft_model(build(1), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(str(tmp_path / "lora"))
    other = PeftModel.from_pretrained(build(2), str(tmp_path / "lora"))
    assert not torch.equal(answers(other, x), answers(lora, x))
    model = walk(build, x, tmp_path / "masks", target_modules=["q_proj"])
    assert saved_whole(model) == ["classifier"]


def test_a_second_task_finds_the_new_head_under_the_first(checkpoints, tmp_path):
    x = pictures()
    model = pemnify(image_classifier(checkpoints["vit"], 1), bank="own", selector="threshold")
    model.add_adapter("b", PemnConfig(bank="own", selector="threshold"))
    model.set_adapter("b")
    trained(model, x)
    model.save_pretrained(str(tmp_path))
    assert model.peft_config["b"].modules_to_save == ["classifier"]
    again = PeftModel.from_pretrained(image_classifier(checkpoints["vit"], 2), str(tmp_path / "b"))
    models.assert_equal(answers(again, x), answers(model, x))


@pytest.mark.parametrize("method", ["mask", "sign_delta"])
def test_a_finetuned_head_is_taken_over_whole(method, checkpoints, tmp_path):
    x, build = pictures(), lambda seed: image_classifier(checkpoints["vit"], seed)
    tuned = trained(build(3), x)
    model = from_finetuned(build(1), tuned, method).eval()
    assert saved_whole(model) == ["classifier"]
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(build(2), str(tmp_path))
    models.assert_equal(answers(again, x), answers(model, x))
    head = again.base_model.model.classifier.modules_to_save["default"]
    models.assert_equal(head.weight, tuned.classifier.weight)


def test_a_head_that_the_checkpoint_has_is_masked(checkpoints):
    model = transformers.AutoModelForImageClassification.from_pretrained(checkpoints["vit"])
    planned = plan(model, bank="own", selector="topk")
    assert not planned.whole
    assert "classifier.weight" in {target.name for target in planned.targets}
    assert (
        pemnify(model, bank="own", selector="topk").peft_config["default"].modules_to_save is None
    )


def test_a_new_table_of_positions_is_saved_with_the_task(checkpoints, tmp_path):
    """Another picture size: the positions are a raw parameter, no module that PEFT could wrap."""
    x = pictures(32)

    def build(seed):
        return image_classifier(checkpoints["vit"], seed, num_labels=5, image_size=32)

    new = new_parts(build(1))
    assert (new.modules, new.tensors) == ((), ("vit.embeddings.position_embeddings",))
    model = walk(build, x, tmp_path)
    assert model.peft_config["default"].carried == ["vit.embeddings.position_embeddings"]


def test_drawn_numbers_keep_their_heads_masked(checkpoints, tmp_path):
    """A seed draws the head again, as before."""
    x, build = pictures(), lambda seed: image_classifier(checkpoints["vit"], seed)
    model = trained(pemnify(build(1), bank="rp", ratio=0.1), x)
    assert saved_whole(model) is None
    model.save_pretrained(str(tmp_path))
    models.assert_equal(
        answers(PeftModel.from_pretrained(build(2), str(tmp_path)), x), answers(model, x)
    )


@pytest.mark.parametrize("given", [[], ["layernorm"]])
def test_a_new_head_that_the_user_leaves_out_is_named(given, checkpoints):
    model = image_classifier(checkpoints["vit"], 1)
    with pytest.warns(HeadWarning, match="1 modules came with no checkpoint.*: classifier"):
        changed = pemnify(model, bank="own", selector="topk", modules_to_save=given)
    assert saved_whole(changed) == given


def test_the_line_that_the_warning_gives_mends_it(checkpoints, tmp_path):
    with pytest.warns(HeadWarning) as caught:
        pemnify(image_classifier(checkpoints["vit"], 1), bank="own", modules_to_save=["layernorm"])
    line = str(caught[0].message).partition("modules_to_save=")[2].partition(")")[0]
    assert line == "['layernorm', 'classifier']"
    build = lambda seed: image_classifier(checkpoints["vit"], seed)  # noqa: E731
    walk(build, pictures(), tmp_path, modules_to_save=["layernorm", "classifier"])


def test_what_peft_wraps_by_the_end_of_a_name_is_not_masked(checkpoints, tmp_path):
    """DistilBERT: "classifier" is the end of "pre_classifier", and PEFT wraps both."""
    kind = transformers.AutoModelForSequenceClassification
    base = kind.from_pretrained(checkpoints["distilbert"])
    options = {"bank": "own", "task_type": "SEQ_CLS", "selector": "threshold"}
    planned = plan(base, **options)
    assert {item.path for item in planned.whole} == {"pre_classifier", "classifier"}
    model = trained(pemnify(base, **options), models.tokens())
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(
        kind.from_pretrained(checkpoints["distilbert"]), str(tmp_path)
    )
    models.assert_equal(answers(again, models.tokens()), answers(model, models.tokens()))


@pytest.mark.parametrize("bank", ["own", "rp"])
@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_what_was_loaded_stays_known_after_masks_are_gone(how, bank, checkpoints):
    """A bank replaces weights; those that come back are no new head for the next masks."""
    kind = transformers.AutoModelForImageClassification
    base = kind.from_pretrained(checkpoints["vit"])
    dense = getattr(pemnify(base, bank=bank), how)()
    assert new_parts(dense).modules == new_parts(dense).tensors == ()
    assert plan(dense, bank="own", selector="topk").whole == ()
    head = kind.from_pretrained(checkpoints["vit"], num_labels=7, ignore_mismatched_sizes=True)
    dense = getattr(pemnify(head, bank=bank), how)()
    assert new_parts(dense).modules == ("classifier",)


def test_a_head_that_was_untied_is_not_new(checkpoints):
    base = transformers.AutoModelForMaskedLM.from_pretrained(checkpoints["bert"])
    assert base.cls.predictions.decoder.weight is base.bert.embeddings.word_embeddings.weight
    model = pemnify(base, bank="own", selector="topk", tied="untie")
    assert new_parts(model.base_model.model).modules == ()
    model.add_adapter("b", PemnConfig(bank="own", selector="topk", tied="untie"))
    assert model.peft_config["b"].modules_to_save is None


def test_a_model_of_which_little_was_loaded_so_is_not_all_new(checkpoints):
    """One part by from_pretrained, the rest by load_state_dict: nobody knows."""

    class Pair(transformers.PreTrainedModel):
        config_class = transformers.ViTConfig

        def __init__(self, config):
            super().__init__(config)
            self.first = transformers.ViTModel(config)
            self.second = transformers.ViTModel(config)
            self.text = nn.Linear(16, 3)

    pair = Pair(transformers.ViTConfig(**VIT))
    pair.first = transformers.ViTModel.from_pretrained(checkpoints["vit"], add_pooling_layer=False)
    assert new_parts(pair).modules == ()
    with pytest.warns(HeadWarning, match="'text'"):
        pemnify(pair, bank="own", selector="topk")


# -- timm -----------------------------------------------------------------------------------------


def timm_net(seed, classes=7):
    """A backbone of one seed, as from a checkpoint, and a head of another."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=11)
    torch.manual_seed(seed)
    model.reset_classifier(classes)
    return model.eval()


class Around(nn.Module):
    """A timm model inside another module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("wrap", [lambda net: net, Around], ids=["bare", "wrapped"])
@pytest.mark.parametrize("options", [{}, {"target_modules": ["conv1", "conv2"]}])
def test_a_timm_classifier_wherever_it_lies(wrap, options, tmp_path):
    model = walk(lambda seed: wrap(timm_net(seed)), pictures(32), tmp_path, **options)
    assert saved_whole(model) == ["fc" if wrap is not Around else "inner.fc"]


# -- where no checkpoint tells --------------------------------------------------------------------


class Vision(nn.Module):
    """Shaped as torchvision's networks: features, then ``fc``; no checkpoint says what is new."""

    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.features(x).mean(dim=(2, 3)))


def vision(seed, classes=7):
    torch.manual_seed(0)
    model = Vision(classes)
    torch.manual_seed(seed)
    model.fc.reset_parameters()
    return model.eval()


@pytest.mark.filterwarnings("default::pemn_surgery.errors.HeadWarning")
@pytest.mark.parametrize(
    "config",
    [PemnConfig.preset("piggyback"), PemnConfig(bank="own", selector="topk")],
    ids=["piggyback", "own"],
)
def test_a_plain_network_asks_for_its_head(config, tmp_path):
    """The line in the warning is the one that mends it; without it the adapter is refused."""
    x = pictures(10)
    with pytest.warns(HeadWarning, match=r"'fc' .Linear .7, 8.*modules_to_save=\['fc'\]"):
        masked = pemnify(vision(1), copy.copy(config))
    masked.save_pretrained(str(tmp_path / "masked"))
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(vision(2), str(tmp_path / "masked"))
    mended = copy.copy(config)
    mended.modules_to_save = ["fc"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = trained(pemnify(vision(1), mended), x)
        model.save_pretrained(str(tmp_path / "mended"))
        again = PeftModel.from_pretrained(vision(2), str(tmp_path / "mended"))
    models.assert_equal(answers(again, x), answers(model, x))


@pytest.mark.filterwarnings("default::pemn_surgery.errors.HeadWarning")
@pytest.mark.parametrize(
    ("name", "head", "layer"),
    [
        ("shufflenet_v2_x0_5", "fc", lambda: nn.Linear(1024, 7)),
        ("squeezenet1_1", "classifier.1", lambda: nn.Conv2d(512, 7, 1)),
    ],
)
def test_piggyback_on_torchvisions_networks(name, head, layer, tmp_path):
    """The paper's own: a network of another task, and a new last layer."""
    networks = pytest.importorskip("torchvision.models")

    def build(seed):
        torch.manual_seed(0)
        net = getattr(networks, name)(weights=None)
        torch.manual_seed(seed)
        net.set_submodule(head, layer())
        return net.eval()

    x = pictures(64)
    with pytest.warns(HeadWarning, match=rf"modules_to_save=\['{head}'\]"):
        pemnify(build(1), PemnConfig.preset("piggyback"))
    model = pemnify(build(1), PemnConfig.preset("piggyback", modules_to_save=[head]))
    trained(model, x, steps=1).save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(build(2), str(tmp_path))
    models.assert_equal(answers(again, x), answers(model, x))


@pytest.mark.filterwarnings("default::pemn_surgery.errors.HeadWarning")
def test_nobody_is_asked_who_has_said_it_or_need_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pemnify(vision(1), bank="own", selector="topk", modules_to_save=[])
        pemnify(vision(1), bank="own", selector="topk", target_modules=["features.0"])
        pemnify(vision(1), bank="rp")
        pemnify(vision(1), PemnConfig.preset("edge_popup"))
        plan(vision(1), bank="own", selector="topk")
        pemnify(timm_net(1), bank="own", selector="topk")


@pytest.mark.filterwarnings("default::pemn_surgery.errors.HeadWarning")
def test_a_head_beside_a_pretrained_model_is_asked_for(checkpoints):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = image_classifier(checkpoints["vit"], 1)
            self.head = nn.Linear(7, 3)

        def forward(self, x):
            return self.head(self.encoder(x).logits)

    with pytest.warns(HeadWarning, match="'head'"):
        pemnify(Stack(), bank="own", selector="topk")
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadWarning)
        pemnify(transformers.LlamaForCausalLM(llama_config()), bank="own", selector="topk")


def llama_config(tokens=40):
    return transformers.LlamaConfig(
        vocab_size=tokens, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, tie_word_embeddings=False,
    )  # fmt: skip


# -- heads of a task's own size -------------------------------------------------------------------


def two_sizes(folder, bank):
    """Save a task of six classes and one of three; return their logits on one batch."""
    x, found = pictures(10), {}
    options = {"bank": bank, "modules_to_save": ["fc"]}
    for name, classes in (("six", 6), ("three", 3)):
        model = trained(pemnify(vision(classes, classes), adapter_name=name, **options), x)
        model.save_pretrained(str(folder))
        found[name] = answers(model, x)
    return x, found


@pytest.mark.parametrize("bank", ["own", "rp"])
def test_tasks_of_six_and_of_three_classes_share_a_model(bank, tmp_path):
    """LoRA refuses the second: its copy of the head has the base's size."""
    x, expected = two_sizes(tmp_path, bank)
    base = vision(9, 6)
    model = PeftModel.from_pretrained(base, str(tmp_path / "six"), adapter_name="six")
    model.load_adapter(str(tmp_path / "three"), "three")
    for name in ("three", "six", "three"):
        model.set_adapter(name)
        models.assert_equal(answers(model, x), expected[name])
    head = model.base_model.model.fc
    assert (head.modules_to_save["three"].out_features, head.original_module.out_features) == (3, 6)
    model.save_pretrained(str(tmp_path / "again"))
    for name in ("six", "three"):
        first = load_file(tmp_path / name / models.WEIGHTS_FILE)
        second = load_file(tmp_path / "again" / name / models.WEIGHTS_FILE)
        assert first.keys() == second.keys()
        for key, value in first.items():
            models.assert_equal(second[key], value)
    merged = model.merge_and_unload()
    assert type(merged.fc) is nn.Linear
    models.assert_equal(answers(merged, x), expected["three"])


def test_the_first_task_may_have_another_size_than_the_base(tmp_path):
    x, expected = two_sizes(tmp_path, "own")
    model = PeftModel.from_pretrained(vision(9, 6), str(tmp_path / "three"))
    models.assert_equal(answers(model, x), expected["three"])
    assert model.base_model.model.fc.original_module.out_features == 6


def test_a_head_of_another_size_trains_on(tmp_path):
    x, _ = two_sizes(tmp_path, "own")
    with pytest.warns(UserWarning, match="holds bits, not scores"):
        model = PeftModel.from_pretrained(vision(9, 6), str(tmp_path / "three"), is_trainable=True)
    start = model.base_model.model.fc.modules_to_save["default"].weight
    assert start.requires_grad
    before = start.detach().clone()
    trained(model, x, steps=1)
    assert not torch.equal(model.base_model.model.fc.modules_to_save["default"].weight, before)


def test_transformers_own_door_takes_heads_of_any_size(checkpoints, tmp_path):
    x, expected = pictures(), {}
    for name, classes in (("seven", 7), ("three", 3)):
        base = image_classifier(checkpoints["vit"], classes, num_labels=classes)
        model = trained(pemnify(base, bank="own", selector="topk", adapter_name=name), x)
        model.save_pretrained(str(tmp_path))
        expected[name] = answers(model, x)
    base = image_classifier(checkpoints["vit"], 9, num_labels=7)
    for name in expected:
        base.load_adapter(str(tmp_path / name), name)
    for name in ("seven", "three", "seven"):
        base.set_adapter(name)
        models.assert_equal(answers(base, x), expected[name])


def test_a_merged_model_says_how_many_classes_it_has(checkpoints, tmp_path):
    """What it saves can be loaded as it is."""
    x, kind = pictures(), transformers.AutoModelForImageClassification
    model = trained(
        pemnify(image_classifier(checkpoints["vit"], 1, num_labels=3), bank="own", selector="topk"),
        x,
    )
    model.save_pretrained(str(tmp_path / "three"))
    base = image_classifier(checkpoints["vit"], 2, num_labels=7)
    merged = PeftModel.from_pretrained(base, str(tmp_path / "three")).merge_and_unload()
    assert (merged.num_labels, merged.config.num_labels, len(merged.config.id2label)) == (3, 3, 3)
    assert float(merged(x, labels=torch.tensor([0, 1, 2, 0])).loss.detach()) > 0
    merged.save_pretrained(tmp_path / "dense")
    models.assert_equal(answers(kind.from_pretrained(tmp_path / "dense"), x), answers(model, x))
    net = timm_net(1, classes=3)
    pemnify(net, bank="own", selector="topk").save_pretrained(str(tmp_path / "timm"))
    again = PeftModel.from_pretrained(timm_net(2, classes=7), str(tmp_path / "timm"))
    assert again.merge_and_unload().num_classes == 3


def test_tensors_that_are_set_by_hand_bring_their_size(tmp_path):
    """PEFT's function alone, as adapters from the hub and resumed runs come in."""
    x, expected = two_sizes(tmp_path, "own")
    model = pemnify(vision(9, 6), bank="own", modules_to_save=["fc"])
    tensors = load_file(tmp_path / "three" / models.WEIGHTS_FILE)
    with pytest.warns(UserWarning, match="holds bits, not scores"):
        set_peft_model_state_dict(model, tensors)
    models.assert_equal(answers(model, x), expected["three"])


def test_samples_of_both_sizes_are_no_one_batch(tmp_path):
    x, expected = two_sizes(tmp_path, "own")
    model = PeftModel.from_pretrained(vision(9, 6), str(tmp_path / "six"), adapter_name="six")
    model.load_adapter(str(tmp_path / "three"), "three")
    model.eval()
    with torch.no_grad():
        with pytest.raises(MixedBatchError, match="different shapes"):
            model(x, adapter_names=["six", "three", "six", "three"])
        models.assert_equal(model(x, adapter_names=["three"] * 4), expected["three"])


def test_only_the_number_of_outputs_may_differ(tmp_path):
    """Another width is another network."""
    wide = vision(1)
    wide.fc = nn.Linear(9, 7)
    wide.features[3] = nn.Conv2d(8, 9, 3)
    options = {
        "bank": "own",
        "selector": "topk",
        "target_modules": ["features.0"],
        "modules_to_save": ["fc"],
    }
    pemnify(wide, **options).save_pretrained(str(tmp_path))
    base = vision(1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ArchitectureError, match=r"fc\.weight"):
        PeftModel.from_pretrained(base, str(tmp_path))
    assert before.keys() == base.state_dict().keys()
    for name, value in base.state_dict().items():
        models.assert_equal(value, before[name])


def test_weight_and_bias_of_a_head_have_one_size(tmp_path):
    """A file put together from two heads is refused before anything changes."""
    options = {
        "bank": "own",
        "selector": "topk",
        "target_modules": ["features.0"],
        "modules_to_save": ["fc"],
    }
    model = vision(1)
    model.fc.bias = nn.Parameter(torch.zeros(5))
    pemnify(model, **options).save_pretrained(str(tmp_path))
    with pytest.raises(ArchitectureError, match=r"fc\.bias"):
        PeftModel.from_pretrained(vision(1, 6), str(tmp_path))


def test_a_masked_head_of_another_size_is_refused_with_the_way_out(tmp_path):
    pemnify(vision(1, 3), bank="rp", ratio=0.1).save_pretrained(str(tmp_path))
    with pytest.raises(ArchitectureError, match=r"modules_to_save=\['fc'\]"):
        PeftModel.from_pretrained(vision(1, 6), str(tmp_path))


# -- added tokens ---------------------------------------------------------------------------------

OLD, NEW, WIDTH = 40, 44, 16


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A language model's checkpoint with its tokenizer, and the tokenizer with four more tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp("language")
    words = Tokenizer(WordLevel({f"t{place}": place for place in range(OLD)}, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(llama_config(OLD)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.add_tokens([f"new{place}" for place in range(NEW - OLD)])
    return str(folder), tokenizer


def grown_model(checkpoint, seed):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(NEW)
    with torch.no_grad():  # transformers draws them around the mean, too near to see a difference
        model.lm_head.weight[OLD:] += torch.randn(NEW - OLD, WIDTH)
        model.model.embed_tokens.weight[OLD:] += torch.randn(NEW - OLD, WIDTH)
    return model.eval()


TOKENS = torch.arange(2 * 22).view(2, 22)  # every token, the new ones too


def save_grown(grown, folder, **options):
    checkpoint, tokenizer = grown
    model = pemnify(grown_model(checkpoint, 1), task_type="CAUSAL_LM", **options)
    trained_model = trained_on_tokens(model)
    trained_model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return trained_model


def trained_on_tokens(model):
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("door", ["resized", "auto"])
@pytest.mark.parametrize("bank", ["own", "rp"])
def test_added_tokens_with_a_head_of_their_own(bank, door, grown, tmp_path):
    model = save_grown(grown, tmp_path, bank=bank)
    torch.manual_seed(2)
    if door == "auto":
        again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path))
    else:
        again = PeftModel.from_pretrained(grown_model(grown[0], 2), str(tmp_path))
    models.assert_equal(answers(again, TOKENS), answers(model, TOKENS))


def test_the_file_holds_every_tensor_once(grown, tmp_path):
    """Of the grown head bits and new rows; of the table, which a bank does not fill, all rows."""
    head, table = "base_model.model.lm_head.", "base_model.model.model.embed_tokens."
    for bank, rows in (("own", NEW - OLD), ("rp", NEW)):
        save_grown(grown, tmp_path / bank, bank=bank)
        tensors = load_file(tmp_path / bank / models.WEIGHTS_FILE)
        found = {key: len(value) for key, value in tensors.items() if "_tokens" in key}
        found |= {key: len(value) for key, value in tensors.items() if "lm_head" in key}
        assert found == {
            f"{head}masked_weight.pemn_masks.bits": 32 + OLD * WIDTH // 8,
            f"{head}task_tensors.pemn_tensors.weight": NEW - OLD,
            f"{table}task_tensors.pemn_tensors.weight": rows,
        }


def test_a_grown_head_of_which_nobody_knows_is_bits_alone(grown, tmp_path):
    """A copy has lost transformers' marks: masked on its own numbers, which the file lacks."""
    checkpoint, _ = grown
    model = pemnify(
        copy.deepcopy(grown_model(checkpoint, 1)),
        bank="own",
        selector="topk",
        task_type="CAUSAL_LM",
    )
    model.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / models.WEIGHTS_FILE)
    keys = [key for key in tensors if "lm_head" in key]
    assert keys == ["base_model.model.lm_head.masked_weight.pemn_masks.bits"]
    again = PeftModel.from_pretrained(grown_model(checkpoint, 1), str(tmp_path))
    models.assert_equal(answers(again, TOKENS), answers(model, TOKENS))
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(grown_model(checkpoint, 2), str(tmp_path))


def test_what_is_saved_twice_by_peft_is_taken_once():
    """The entries themselves, against a list: what has a form in the adapter is not added."""
    entries = AdapterEntries(
        {
            "b.lm_head.masked_weight.pemn_masks.default.bits": torch.zeros(1),
            "b.embed.task_tensors.pemn_tensors.default.weight": torch.zeros(2),
        }
    )
    entries.update({"b.score.weight": torch.zeros(3)})
    entries.update(
        {
            "b.lm_head.weight": torch.zeros(9),
            "b.lm_head.masked_weight.pemn_masks.default.scores": torch.zeros(9),
            "b.embed.weight": torch.zeros(9),
            "b.score.original_module.weight": torch.zeros(9),
            "b.score.modules_to_save.default.weight": torch.zeros(9),
            "b.table.original_module.weight": torch.zeros(4),
        }
    )
    assert {key: len(value) for key, value in entries.items()} == {
        "b.lm_head.masked_weight.pemn_masks.default.bits": 1,
        "b.embed.task_tensors.pemn_tensors.default.weight": 2,
        "b.score.weight": 3,
        "b.table.weight": 4,
    }

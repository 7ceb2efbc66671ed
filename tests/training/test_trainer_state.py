"""What a Trainer's checkpoints hold without any help, and runs that go on from them."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, BertModel, Trainer, TrainerCallback

from pemn_surgery import PemnCallback, PemnConfig, pemnify
from pemn_surgery.errors import FingerprintError
from tests.adapters import models
from tests.training import test_trainer as trainers

pytestmark = [
    models.ignore_peft_on_transformers,
    pytest.mark.filterwarnings("ignore::pemn_surgery.errors.NoGradientWarning"),  # BERT's pooler
]
STEPS, SAVED = 4, 2

with_and_without = pytest.mark.parametrize("callback", [False, True], ids=["bare", "callback"])


class FailAfter(TrainerCallback):
    """Ends a run from outside, one step after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SAVED + 1:
            raise KeyboardInterrupt


def train(make, folder, *, fail=False, resume=False):
    trainer = make(folder)
    if fail:
        trainer.add_callback(FailAfter())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        return trainer
    place = str(folder / f"checkpoint-{SAVED}") if resume else None
    trainer.train(resume_from_checkpoint=place)
    return trainer


def kinds(folder):
    """How many masks a file holds as what."""
    names = [key.rpartition(".")[2] for key in load_file(folder / models.WEIGHTS_FILE)]
    return {kind: names.count(kind) for kind in ("scores", "bits", "fingerprint")}


def makers(callback):
    """Trainers of a timm model and of a BERT, evaluated in bfloat16 or not."""
    callbacks = [PemnCallback()] if callback else []

    def maker(kind, **changes):
        build, data = trainers.KINDS[kind]
        return lambda folder: Trainer(
            model=build(), args=trainers.arguments(folder, max_steps=STEPS, **changes),
            train_dataset=data(), eval_dataset=data(), callbacks=callbacks,
        )  # fmt: skip

    return maker


@with_and_without
@pytest.mark.parametrize("changes", [{}, {"bf16_full_eval": True}], ids=["", "bf16_full_eval"])
@pytest.mark.parametrize("kind", list(trainers.KINDS))
def test_a_resumed_run_equals_one_that_never_stopped(kind, changes, callback, tmp_path):
    make = makers(callback)(kind, **changes)
    whole = train(make, tmp_path / "whole")
    stopped = train(make, tmp_path / "parts", fail=True)
    count = len(models.mask_layers(whole.model))
    saved = kinds(tmp_path / "parts" / f"checkpoint-{SAVED}")
    assert saved == {"scores": count, "bits": 0, "fingerprint": count}
    resumed = train(make, tmp_path / "parts", resume=True)
    models.assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert models.flips(models.masks(stopped.model), models.masks(whole.model)) > 0
    for trainer, name in ((whole, "whole"), (resumed, "parts")):
        trainer.save_model(str(tmp_path / name / "final"))
        assert kinds(tmp_path / name / "final") == {"scores": 0, "bits": count, "fingerprint": 0}
    files = [tmp_path / name / "final" / models.WEIGHTS_FILE for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("callback", "kept"), [(False, "bits"), (True, "scores")])
def test_what_is_saved_by_hand_of_a_run_that_was_interrupted(callback, kept, tmp_path):
    """With the callback nothing that was trained is lost."""
    trainer = train(makers(callback)("timm"), tmp_path, fail=True)
    trainer.model.save_pretrained(str(tmp_path / "by_hand"))
    assert kinds(tmp_path / "by_hand")[kept] == len(models.mask_layers(trainer.model))
    again = PeftModel.from_pretrained(trainers.timm_model().unload(), str(tmp_path / "by_hand"))
    models.assert_same_tensors(models.masks(again), models.masks(trainer.model))


def test_evaluation_in_bfloat16_before_the_final_save(tmp_path):
    """The Trainer casts the model for it; the masks in the file are those that were trained."""
    trainer = train(makers(callback=False)("bert", bf16_full_eval=True), tmp_path)
    twin = copy.deepcopy(trainer.model)
    for model, dtype in ((trainer.model, torch.float32), (twin, torch.bfloat16)):
        for layer in models.mask_layers(model).values():
            scores = layer.mask_of("default").scores
            scores.data = (0.1 + 1e-3 * scores.data).to(dtype)  # so close that rounding turns some
    expected = models.masks(trainer.model)
    assert models.flips(expected, models.masks(twin)) > 0
    trainer.evaluate()
    frozen = [p for n, p in trainer.model.named_parameters() if n.endswith("query.weight")]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    trainer.save_model(str(tmp_path / "final"))
    again = PeftModel.from_pretrained(trainers.bert_model().unload(), str(tmp_path / "final"))
    models.assert_same_tensors(models.masks(again), expected)


def test_a_resume_on_another_base_is_refused(tmp_path):
    train(makers(callback=False)("bert"), tmp_path)
    other = pemnify(models.bert(1), bank="own", selector="topk", task_type="SEQ_CLS")
    _, data = trainers.KINDS["bert"]
    before = {name: value.clone() for name, value in other.state_dict().items()}
    trainer = Trainer(model=other, args=trainers.arguments(tmp_path), train_dataset=data())
    with pytest.raises(FingerprintError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    models.assert_same_tensors(other.state_dict(), before)


# A model within another module, as sentence-transformers has it: SentenceTransformer is a
# Sequential whose first child holds a transformers model; it saves that model's way, is loaded by
# its class from a folder, and its Trainer resumes by copying a loaded model's state dict.


class Sentences(nn.Module):
    """A transformers model with adapters, mean pooling, and a loss against labels."""

    def __init__(self, auto_model):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.auto_model = auto_model

    def forward(self, input_ids, labels):
        hidden = self.transformer.auto_model(input_ids=input_ids).last_hidden_state.mean(dim=1)
        return {"loss": nn.functional.cross_entropy(hidden, labels), "logits": hidden}

    def save_pretrained(self, folder):
        self.transformer.auto_model.save_pretrained(folder)

    @classmethod
    def from_folder(cls, folder):
        return cls(AutoModel.from_pretrained(folder))


class SentencesTrainer(Trainer):
    """Saves and resumes as SentenceTransformerTrainer does."""

    def _save(self, output_dir=None, state_dict=None):
        self.model.save_pretrained(output_dir)

    def _load_from_checkpoint(self, checkpoint_path):
        loaded = type(self.model).from_folder(checkpoint_path)
        self.model.load_state_dict(loaded.state_dict())


@pytest.fixture
def base(tmp_path):
    """A checkpoint of a base, by whose path adapters know it."""
    folder = tmp_path / "base"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(models.bert_config(), add_pooling_layer=True).save_pretrained(folder)
    return str(folder)


ADAPTERS = {
    "own": lambda: PemnConfig(bank="own", selector="topk"),
    "rp": lambda: PemnConfig(bank="rp", ratio=0.1),
    "lora": lambda: LoraConfig(target_modules=["query"]),
}


def sentences_maker(base, config, callback):
    def make(folder):
        torch.manual_seed(0)
        model = AutoModel.from_pretrained(base)
        model.add_adapter(config())
        _, data = trainers.KINDS["bert"]
        return SentencesTrainer(
            model=Sentences(model), args=trainers.arguments(folder, max_steps=STEPS),
            train_dataset=data(), callbacks=[PemnCallback()] if callback else [],
        )  # fmt: skip

    return make


@with_and_without
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_adapters_within_another_module_resume_exactly(adapter, callback, base, tmp_path):
    """As LoRA's do."""
    make = sentences_maker(base, ADAPTERS[adapter], callback)
    whole = train(make, tmp_path / "whole")
    train(make, tmp_path / "parts", fail=True)
    resumed = train(make, tmp_path / "parts", resume=True)
    models.assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    if adapter == "lora":
        return
    count = len(models.mask_layers(whole.model))
    assert kinds(tmp_path / "parts" / f"checkpoint-{SAVED}")["scores"] == count
    whole.save_model(str(tmp_path / "final"))
    assert kinds(tmp_path / "final") == {"scores": 0, "bits": count, "fingerprint": 0}
    again = Sentences.from_folder(tmp_path / "final")
    models.assert_same_tensors(models.masks(again), models.masks(whole.model))
    if callback:
        logs = [log for log in whole.state.log_history if "loss" in log]
        assert [log["pemn_density"] for log in logs] == [0.5] * STEPS
        assert sum(log["pemn_flips"] for log in logs) > 0


def test_a_peft_model_within_another_module_writes_scores(base, tmp_path):
    """Its checkpoint goes on in a PEFT model that is made anew, and its final save is bits."""
    _, data = trainers.KINDS["bert"]
    inner = get_peft_model(AutoModel.from_pretrained(base), PemnConfig(bank="own", selector="topk"))
    trainer = SentencesTrainer(
        model=Sentences(inner), args=trainers.arguments(tmp_path, max_steps=SAVED),
        train_dataset=data(), callbacks=[PemnCallback()],
    )  # fmt: skip
    trainer.train()
    folder = str(tmp_path / f"checkpoint-{SAVED}")
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder, is_trainable=True)
    models.assert_same_tensors(again.state_dict(), inner.state_dict())
    assert sum(name.endswith(".scores") for name in again.state_dict()) > 5
    trainer.save_model(str(tmp_path / "final"))
    assert kinds(tmp_path / "final")["scores"] == 0
    assert kinds(tmp_path / "final")["bits"] > 5

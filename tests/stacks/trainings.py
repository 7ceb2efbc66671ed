"""Runs that are interrupted and resumed, one function a stack.

Every stack trains the same tiny tasks. ``train(stack, folder, stop, resume)`` trains to the end, or
until the machine "fails" after step ``stop``, or goes on from what is in the folder.
"""

import functools
import inspect
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from pemn_surgery import PemnCallback, PemnConfig, pemnify
from tests.adapters import models

STEPS, SAVED = 6, 4  # a checkpoint is written every second step

# What transformers calls activation checkpointing, until 5.20 and since.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in inspect.signature(TrainingArguments).parameters
)
ROWS = 24


class MachineFailed(RuntimeError):
    """Stands for whatever ends a run from outside."""


class FailAfter(TrainerCallback):
    """Fails one step after a checkpoint, so that a step has to be done again."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step + 1:
            raise MachineFailed


def llama(seed=0):
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def masks_config():
    return PemnConfig(bank="rp", ratio=0.1, task_type="CAUSAL_LM")


def sentences():
    ids = models.tokens(0, ROWS)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, kind=TrainingArguments, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "learning_rate": 0.02, "logging_steps": 1, "save_steps": 2, "use_cpu": True, "seed": 3,
        "report_to": "none", "remove_unused_columns": False, "dataloader_pin_memory": False,
        "disable_tqdm": True, "lr_scheduler_type": "linear", "bf16": False,
        CHECKPOINTING: False,
    }  # fmt: skip
    return kind(**{**settings, **changes})


def with_trainer(folder, **changes):
    return Trainer(
        model=pemnify(llama(), masks_config()),
        args=arguments(folder, **changes),
        train_dataset=sentences(),
        eval_dataset=sentences()[:4],
        callbacks=[PemnCallback()],
    )


def zero(stage):
    """DeepSpeed's configuration, as docs/training.md gives it."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def with_trl(folder):
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=llama(),
        args=arguments(
            folder, SFTConfig, max_length=8, dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=rows_for_trl(),
        processing_class=tokenizer(),
        peft_config=masks_config(),
        callbacks=[PemnCallback()],
    )


def rows_for_trl():
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": models.tokens(0, ROWS).tolist()})


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(40)}
    made = Tokenizer(WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


TRAINERS = {
    "trainer": with_trainer,
    "accumulation": functools.partial(with_trainer, gradient_accumulation_steps=3),
    "bf16": functools.partial(with_trainer, bf16=True),
    "checkpointing": functools.partial(with_trainer, **{CHECKPOINTING: True}),
    "best_model": functools.partial(
        with_trainer, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2
    ),
    "sft": with_trl,
    "zero2": functools.partial(with_trainer, deepspeed=zero(2)),
    "zero3": functools.partial(with_trainer, deepspeed=zero(3)),
}


def train_by_trainer(build, folder, stop=None, *, resume=False):
    trainer = build(folder)
    if stop is not None:
        trainer.add_callback(FailAfter(stop))
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except MachineFailed:
        return None
    trainer.save_model(str(Path(folder) / "final"))
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def train_by_accelerate(folder, stop=None, *, resume=False):
    """A loop of one's own, saved with ``save_state``."""
    torch.manual_seed(3)
    accelerator = Accelerator(cpu=True)
    model = pemnify(llama(), masks_config()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model, optimizer = accelerator.prepare(model, optimizer)
    start = 0
    if resume:
        accelerator.load_state(str(Path(folder) / "state"))
        start = SAVED
    ids = models.tokens(0, ROWS)
    for step in range(start, STEPS):
        if stop is not None and step == stop + 1:
            return None
        batch = ids[2 * step : 2 * step + 2]
        optimizer.zero_grad()
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        if step + 1 == SAVED:
            accelerator.save_state(str(Path(folder) / "state"))
    trained = accelerator.unwrap_model(model)
    trained.save_pretrained(str(Path(folder) / "final"))
    return trained


def train(stack, folder, stop=None, *, resume=False):
    if stack == "accelerate":
        return train_by_accelerate(folder, stop, resume=resume)
    return train_by_trainer(TRAINERS[stack], folder, stop, resume=resume)


STACKS = (*(name for name in TRAINERS if not name.startswith("zero")), "accelerate")

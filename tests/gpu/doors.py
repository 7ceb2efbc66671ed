"""What a user does with the library, each on a device and beside the same on the CPU.

A door is a function of the device. It raises AssertionError where what comes out is wrong, and
returns figures. Nothing here needs pytest, a download or another package than the library's own;
doors that do raise `Missing`.
"""

import contextlib
import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from pemn_surgery import PemnCallback, PemnConfig, infer_task, keep_weights, pemnify
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.masks.selector import topk_mask

BANKS: dict[str, dict[str, Any]] = {
    "mp": {"bank": "mp"},
    "rp": {"bank": "rp", "ratio": 0.05},
    "rp, permuted": {"bank": "rp", "ratio": 0.05, "permute": True},
    "one_layer": {"bank": "one_layer"},
    "own": {"bank": "own", "selector": "topk"},
    "own, threshold, scaled": {"bank": "own", "selector": "threshold", "scale": "sqrt_density"},
}
CODINGS = ("bits", "entropy", "context", "base")
WEIGHTS = "adapter_model.safetensors"
Figures = dict[str, Any]


class Missing(Exception):
    """Not an error: a door needs what is not installed."""


class Net(nn.Module):
    """Convolutions of one shape with norms, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean(dim=(2, 3)))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose own numbers are those of the CPU's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def images(seed: int = 0, count: int = 8) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 8) -> Tensor:
    return torch.arange(count) % 4


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def layers(model: nn.Module) -> list[PemnLayer]:
    found = [module for module in model.modules() if isinstance(module, PemnLayer)]
    assert found, "nothing is masked"
    return found


def masks(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    return [layer.mask_of(adapter).mask().cpu() for layer in layers(model)]


def train(model: nn.Module, device: torch.device, steps: int = 4, seed: int = 0) -> list[float]:
    """Adam on one batch; the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    x, y, losses = images(seed).to(device), labels().to(device), []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(loss == loss for loss in losses), losses
    return losses


@torch.no_grad()
def says(model: nn.Module, device: torch.device, seed: int = 99) -> Tensor:
    return model.eval()(images(seed).to(device))


def same(one: Tensor, two: Tensor, what: str) -> None:
    assert (one.shape, one.dtype) == (two.shape, two.dtype), what
    gap = float((one.cpu().double() - two.cpu().double()).abs().max()) if one.numel() else 0.0
    assert torch.equal(one.cpu(), two.cpu()), f"{what}: largest gap {gap}"


def near(one: Tensor, two: Tensor, limit: float) -> float:
    gap = float((one.cpu().double() - two.cpu().double()).abs().max())
    assert gap <= limit, f"gap {gap}, at most {limit}"
    return gap


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# ---- numbers, masks, files -----------------------------------------------------------------------


def bank_bits(device: torch.device) -> Figures:
    """One seed gives one bank, wherever it is drawn."""
    for options in BANKS.values():
        here, there = (pemnify(seeded(Net).to(d), **options) for d in ("cpu", device))
        for one, two in zip(layers(here), layers(there), strict=True):
            same(one.fill(), two.fill(), one.target)
            same(one.mask_of("default").scores, two.mask_of("default").scores, "scores")
    return {"banks": len(BANKS)}


def selection(device: torch.device) -> Figures:
    """Masks of equal scores are equal bit for bit, ties and all, in every type."""
    checked = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (1, 7, 1000, 300_001):
            scores = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
            scores[::3] = scores[0]
            for density in (0.0, 0.03, 0.5, 0.97, 1.0):
                expected = topk_mask(scores, density)
                same(topk_mask(scores.to(device), density), expected, f"{dtype}, {count}")
                checked += 1
    return {"masks": checked}


def initial_outputs(device: torch.device) -> Figures:
    gaps = {}
    for name, options in BANKS.items():
        here, there = (pemnify(seeded(Net).to(d), **options) for d in ("cpu", device))
        for one, two in zip(masks(here), masks(there), strict=True):
            same(one, two, name)
        gaps[name] = near(says(here, torch.device("cpu")), says(there, device), 1e-3)
    return {"largest gap": max(gaps.values())}


def file_bytes(device: torch.device) -> Figures:
    """The same masks make the same file, in every coding."""
    sizes = {}
    for coding in CODINGS:
        for bank in ("rp", "own"):
            written = []
            for where in (torch.device("cpu"), device):
                model = pemnify(seeded(Net).to(where), coding=coding, **BANKS[bank])
                with folder() as path:
                    model.save_pretrained(path)
                    written.append((path / WEIGHTS).read_bytes())
            assert written[0] == written[1], f"{coding}, {bank}: files differ"
            sizes[f"{coding}, {bank}"] = len(written[0])
    return {"bytes": sizes}


# ---- training ------------------------------------------------------------------------------------


def training(device: torch.device) -> Figures:
    """Losses fall, masks move, and gradients are the CPU's."""
    flips = {}
    for name, options in BANKS.items():
        here, there = (pemnify(seeded(Net).to(d), **options) for d in ("cpu", device))
        for model, where in ((here, torch.device("cpu")), (there, device)):
            model.train()
            F.cross_entropy(model(images().to(where)), labels().to(where)).backward()
        for one, two in zip(layers(here), layers(there), strict=True):
            grads = [layer.mask_of("default").scores.grad for layer in (one, two)]
            near(*grads, 1e-3 * float(grads[0].abs().max()) + 1e-6)
        there.zero_grad()
        before = masks(there)
        losses = train(there, device, steps=8)
        assert losses[-1] < losses[0], (name, losses)
        flips[name] = sum(int((a != b).sum()) for a, b in zip(before, masks(there), strict=True))
        assert flips[name] > 0, name
    return {"flips": flips}


def autocast(device: torch.device) -> Figures:
    """bfloat16 and, with a scaler, float16: scores stay float32 and get finite gradients."""
    for dtype in (torch.bfloat16, torch.float16):
        model = pemnify(seeded(Net).to(device), bank="own", selector="topk").train()
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        with torch.autocast(device.type, dtype):
            loss = F.cross_entropy(model(images().to(device)).float(), labels().to(device))
        scaler.scale(loss).backward()
        for layer in layers(model):
            scores = layer.mask_of("default").scores
            assert scores.dtype == torch.float32
            assert torch.isfinite(scores.grad).all(), dtype
    return {}


def checkpointing(device: torch.device) -> Figures:
    """timm's activation checkpointing changes no gradient."""
    make = lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)  # noqa: E731
    grads = []
    for again in (False, True):
        model = pemnify(seeded(make).to(device), bank="rp", ratio=0.05).train()
        model.get_base_model().set_grad_checkpointing(again)
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
        model(x).square().mean().backward()
        grads.append([layer.mask_of("default").scores.grad for layer in layers(model)])
    return {"gap": max(near(a, b, 1e-5) for a, b in zip(*grads, strict=True))}


def compiled(device: torch.device) -> Figures:
    """torch.compile in one graph, forward and backward."""
    if importlib.util.find_spec("triton") is None and device.type == "cuda":
        raise Missing("triton")
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    model = pemnify(seeded(Net).to(device), bank="mp").train()
    plain = copy.deepcopy(model)
    made = torch.compile(model, fullgraph=True, backend=backend)
    gap = near(made(images().to(device)), plain(images().to(device)), 1e-3)
    made(images().to(device)).square().mean().backward()
    assert all(layer.mask_of("default").scores.grad is not None for layer in layers(model))
    return {"gap": gap, "backend": backend}


def resume(device: torch.device) -> Figures:
    """transformers' Trainer, stopped and resumed, ends where it would have ended."""
    if importlib.util.find_spec("accelerate") is None:
        raise Missing("accelerate")
    ids = torch.randint(3, 64, (16, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def trainer(path: Path, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(path), max_steps=steps, per_device_train_batch_size=4, save_steps=2,
            learning_rate=0.02, report_to="none", disable_tqdm=True, seed=3,
            lr_scheduler_type="constant", use_cpu=device.type == "cpu", logging_steps=100,
            dataloader_pin_memory=False,
        )  # fmt: skip
        model = pemnify(seeded(llama), bank="rp", ratio=0.1, task_type="CAUSAL_LM")
        return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[PemnCallback()])

    with folder() as path:
        whole, part, rest = trainer(path / "w", 4), trainer(path / "p", 2), trainer(path / "p", 4)
        whole.train()
        part.train()
        rest.train(resume_from_checkpoint=True)
        expected, found = whole.model.state_dict(), rest.model.state_dict()
        assert expected.keys() == found.keys()
        gaps = [near(found[k].float(), v.float(), 1e-4) for k, v in expected.items()]
    return {"tensors": len(gaps), "gap": max(gaps)}


# ---- serving -------------------------------------------------------------------------------------


def save_and_load(device: torch.device) -> Figures:
    for name, options in BANKS.items():
        model = pemnify(seeded(Net).to(device), **options)
        train(model, device)
        expected = says(model, device)
        with folder() as path:
            model.save_pretrained(path)
            loaded = PeftModel.from_pretrained(seeded(Net).to(device), path)
            same(says(loaded, device), expected, name)
            moved = PeftModel.from_pretrained(seeded(Net), path).to(device)
            same(says(moved, device), expected, f"{name}, moved")
        dense = loaded.merge_and_unload()
        near(says(dense, device), expected, 1e-5)
    return {"banks": len(BANKS)}


def many_tasks(device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    model = pemnify(seeded(Net).to(device), bank="mp")
    said = {}
    for seed, name in enumerate(("default", "two", "three")):
        if name != "default":
            model.add_adapter(name, PemnConfig(bank="mp"))
            model.set_adapter(name)
        train(model, device, seed=seed)
        said[name] = says(model, device)
    return model, said


def switching(device: torch.device) -> Figures:
    model, said = many_tasks(device)
    for name in (*said, *said):
        model.set_adapter(name)
        same(says(model, device), said[name], name)
    model.merge_adapter()
    near(says(model, device), said["three"], 1e-5)
    model.unmerge_adapter()
    same(says(model, device), said["three"], "unmerged")
    return {"tasks": len(said)}


def mixed_batch(device: torch.device) -> Figures:
    model, said = many_tasks(device)
    names = [list(said)[i % 3] for i in range(8)]
    with torch.no_grad():
        mixed = model.eval()(images(99).to(device), adapter_names=names)
    gaps = [near(mixed[i], said[name][i], 1e-5) for i, name in enumerate(names)]
    return {"gap": max(gaps)}


def unknown_task(device: torch.device) -> Figures:
    model, said = many_tasks(device)
    model, x = model.eval(), images(1).to(device)
    guesses = {
        "entropy": infer_task(model, x),
        "spare outputs": infer_task(model, x, objective="spare_outputs", classes=2),
        "statistics": infer_task(model, x, method="statistics"),
    }
    for guess in guesses.values():
        compared = {**guess.gradients, **guess.divergences}
        assert set(compared) == set(said)
        assert all(value == value for value in compared.values()), compared
    return {way: guess.name for way, guess in guesses.items()}


def kept_weights(device: torch.device) -> Figures:
    """A model that keeps effective weights says what one that keeps none says, after any write."""
    model = pemnify(seeded(Net).to(device), bank="own", selector="topk")
    train(model, device)
    for write in ("nothing", "scores", "weights"):
        says(model, device)
        for layer in layers(model):
            if write == "scores":
                layer.mask_of("default").scores.data.mul_(-1.5).add_(0.01)
            elif write == "weights":
                layer.own_weight().data.mul_(0.5)
        found = says(model, device)
        keep_weights(model, False)
        same(found, says(model, device), write)
        keep_weights(model, True)
    return {}


def casts(device: torch.device) -> Figures:
    """Half and bfloat16 models say what the same masks on the same rounded numbers say."""
    for dtype in (torch.bfloat16, torch.float16):
        model = pemnify(seeded(Net).to(device), bank="rp", ratio=0.05)
        before = masks(model)
        model.to(dtype)
        for one, two in zip(before, masks(model), strict=True):
            same(one, two, str(dtype))
        with torch.no_grad():
            assert model.eval()(images().to(device, dtype)).dtype == dtype
    return {}


def recorded(device: torch.device) -> Figures:
    """A CUDA graph of a loaded task's forward gives what the forward gives."""
    if device.type != "cuda":
        raise Missing("CUDA")
    model = pemnify(seeded(Net).to(device), bank="mp", inference_mode=True).eval()
    x = images().to(device)
    with torch.no_grad():
        expected = model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(x)
        graph.replay()
        torch.cuda.synchronize()
        same(found, expected, "graph")
    return {}


def generation(device: torch.device) -> Figures:
    model = pemnify(seeded(llama).to(device), bank="rp", ratio=0.1, task_type="CAUSAL_LM").eval()
    start = torch.tensor([[1, 5, 9]], device=device)
    found = model.generate(input_ids=start, max_new_tokens=6, do_sample=False)
    return {"tokens": found.shape[1]}


# ---- quantised bases -----------------------------------------------------------------------------


def bitsandbytes(device: torch.device) -> Figures:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Missing("bitsandbytes")
    import bitsandbytes as bnb

    make: dict[str, Callable[[], nn.Module]] = {
        "4 bits": lambda: bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32),
        "8 bits": lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    }
    for name, layer in make.items():
        model = seeded(lambda layer=layer: nn.Sequential(layer(), nn.ReLU(), nn.Linear(64, 4)))
        _quantised(model.to(device), name, device)
    return {"kinds": len(make)}


def torchao(device: torch.device) -> Figures:
    if importlib.util.find_spec("torchao") is None:
        raise Missing("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))).to(device)
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name == "0")
    _quantised(model, "int8", device)
    return {"kinds": 1}


def _quantised(model: nn.Module, name: str, device: torch.device) -> None:
    config = PemnConfig(bank="own", selector="topk", target_modules=["0"], modules_to_save=["2"])
    masked = get_peft_model(model, config).train()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(device)
    masked(x).square().mean().backward()
    scores = layers(masked)[0].mask_of("default").scores
    assert 0 < float(scores.grad.abs().sum()) < float("inf"), name


DOORS: list[Callable[[torch.device], Figures]] = [
    bank_bits, selection, initial_outputs, file_bytes, training, autocast, checkpointing, compiled,
    resume, save_and_load, switching, mixed_batch, unknown_task, kept_weights, casts, recorded,
    generation, bitsandbytes, torchao,
]  # fmt: skip


def quiet() -> None:
    """What the library warns of in these tiny models is known."""
    warnings.simplefilter("ignore")

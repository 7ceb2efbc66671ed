"""Files that claim masks of far more weights than they can be worth take no memory."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from pemn_surgery import PemnConfig, compare_adapters, pemnify, recode
from pemn_surgery.adapters.files import contents
from pemn_surgery.adapters.files.adapter_file import read_adapter_file, read_decoded
from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.header import assemble, inspect
from pemn_surgery.errors import AdapterFileError, MaskFormatError
from tests.adapters import coded, models
from tests.stored import forced

pytestmark = models.ignore_peft_on_transformers

PAYLOAD = 2**20
KEY = "base_model.model.conv2.masked_weight.pemn_masks.bits"
WEIGHTS = 9216  # of the layer

# Coding, options, and what stands before the stream: as many weights are claimed as may be.
BOMBS = {
    "entropy": ("entropy", 65472, b""),
    "context": ("context", 1 << 8, b"\x00\x7f"),
    "base": ("base", 1 << 8 | 0x10, b"\x00\x7f\x7f"),
}
CLAIMED = 8192 * PAYLOAD


def bomb(kind, weights=CLAIMED, payload=PAYLOAD):
    """A mask whose own checksum is right, of as many weights as its bytes may hold."""
    coding, options, head = BOMBS[kind]
    content = head + bytes(payload - len(head) - 1) + b"\1"
    return assemble(coding, options, weights, bytes(12), np.frombuffer(content, np.uint8))


def put(folder, mask, key=KEY):
    """Save an adapter by hand, without a seal, one mask replaced."""
    options = {"bank": "rp", "ratio": 0.1, "seed": 3}
    pemnify(coded.net(), **options).save_pretrained(str(folder))
    models.forget_digest(folder)
    tensors = load_file(folder / models.WEIGHTS_FILE)
    assert tensors[KEY].numel() == bits.packed_bytes(WEIGHTS)
    save_file({**tensors, key: mask}, folder / models.WEIGHTS_FILE)


DOORS = """
import json, resource, sys, warnings
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import PemnError
from tests.adapters import coded
warnings.simplefilter("ignore")

options = {"bank": "rp", "ratio": 0.1, "seed": 3}
folder = sys.argv[1]
held = pemnify(coded.net(), **options)
doors = {
    "from_pretrained": lambda: PeftModel.from_pretrained(coded.net(), folder),
    "get_peft_model": lambda: set_peft_model_state_dict(
        get_peft_model(coded.net(), PemnConfig(**options)),
        load_file(folder + "/adapter_model.safetensors"),
    ),
    "load_adapter": lambda: held.load_adapter(folder, "other"),
    "load in its place": lambda: held.load_adapter(folder, "default"),
    "hotswap": lambda: hotswap_adapter(held, folder, "default"),
}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, found = peak(), {}
for name, door in doors.items():
    try:
        door()
    except PemnError as error:
        found[name] = [type(error).__name__, str(error)]
print(json.dumps([found, peak() - before]))
"""


@pytest.mark.parametrize("kind", BOMBS)
def test_loads_compare_with_the_layer_before_anything_is_decoded(kind, tmp_path):
    mask = bomb(kind)
    claimed = inspect(mask, "m").weights
    assert claimed >= 64 * mask.numel()
    put(tmp_path, mask)
    found, kilobytes = json.loads(models.run_python(DOORS, tmp_path))
    assert set(found) == {
        "from_pretrained", "get_peft_model", "load_adapter", "load in its place", "hotswap",
    }  # fmt: skip
    for name, (error, said) in found.items():
        assert error == "ArchitectureError", (name, said)
        assert str(claimed) in said, name
        assert str(WEIGHTS) in said, name
    assert kilobytes < 60_000  # the doors, and a file of a megabyte


@pytest.mark.parametrize("door", ["ones", "recode", "compare", "read"])
@pytest.mark.parametrize("kind", ["entropy", "context"])
def test_without_a_model_a_file_must_be_worth_what_it_asks_for(kind, door, tmp_path):
    mask = bomb(kind)
    put(tmp_path, mask)
    path = tmp_path / models.WEIGHTS_FILE
    doors = {
        "ones": lambda: read_adapter_file(path).ones,
        "recode": lambda: recode(tmp_path, "bits", tmp_path / "out"),
        "compare": lambda: compare_adapters(tmp_path, tmp_path),
        "read": lambda: read_decoded(path),
    }
    before = path.read_bytes()
    with pytest.raises(MaskFormatError) as error:
        doors[door]()
    of_a_weight = 0.3 if kind == "entropy" else 6
    claimed = CLAIMED
    most = 2**30 + 128 * path.stat().st_size
    needed = int(of_a_weight * claimed) + bits.packed_bytes(claimed)
    models.says(
        error, repr(str(path)), "'conv2.weight'", f"{claimed:,} weights", f"{needed:,} bytes",
        f"at most {most:,}", "PeftModel.from_pretrained(base, folder)",
    )  # fmt: skip
    assert path.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_the_configuration_of_such_a_file_is_read_and_its_masks_are_not(tmp_path):
    put(tmp_path, bomb("entropy"))
    file = PemnConfig.from_pretrained(str(tmp_path)).origin.file
    assert file.sizes["conv2.weight"] == CLAIMED
    assert file.headers["conv2.weight"].coding == "entropy"


@pytest.mark.parametrize("coding", ["entropy", "context"])
def test_what_a_mask_takes_is_bounded_by_what_is_said(coding, monkeypatch, tmp_path):
    """The limit counts in `codec.room`: what decoding takes stays within it."""
    mask = torch.ones(2**22, dtype=torch.bool)
    mask[:: 2**12] = False
    stored = forced(mask, (), (2, 2)) if coding == "context" else codec.encode(bits.pack(mask))
    header = inspect(stored, "m")
    assert header.coding == coding
    tracemalloc.start()
    codec.decode(stored, "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < codec.room(header) + bits.packed_bytes(header.weights) + 5e6

    put(tmp_path, stored)
    path = tmp_path / models.WEIGHTS_FILE
    needed = codec.room(header) + bits.packed_bytes(header.weights)
    monkeypatch.setattr(contents, "_ROOM_A_BYTE", 0)
    monkeypatch.setattr(contents, "_ROOM", needed)
    assert read_adapter_file(path).ones["conv2.weight"] == int(mask.sum())
    assert torch.equal(read_decoded(path).tensors[KEY], bits.pack(mask))
    monkeypatch.setattr(contents, "_ROOM", needed - 1)
    with pytest.raises(MaskFormatError, match=f"at most {needed - 1:,} are taken"):
        read_decoded(path)


def test_masks_near_their_limit_of_density_are_worth_it():
    """Masks of density .997 of any size; a model of 70 billion weights at .999."""
    for weights, bits_a_weight in [(2**33, 0.0295), (7e10, 0.0114)]:
        file = int(weights * bits_a_weight / 8)
        largest = min(weights, 2**29)
        assert weights / 8 + 0.3 * largest < 2**30 + 128 * file


def test_a_code_that_holds_other_weights_is_refused_before_the_model_changes(tmp_path):
    """A whole file but for its code, of the layer's size: decoded once sizes are compared."""
    put(tmp_path, bomb("entropy", WEIGHTS, 64))
    base = coded.net()
    before = models.Snapshot(base)
    with pytest.raises(MaskFormatError, match="conv2"):
        PeftModel.from_pretrained(base, str(tmp_path))
    before.assert_unchanged()


@pytest.mark.parametrize(
    "other", [KEY.replace("bits", "others"), KEY.removeprefix("base_model.model.")]
)
def test_two_masks_of_one_weight_are_refused(other, tmp_path):
    """The one could be compared with the layer, and the other decoded."""
    put(tmp_path, bomb("entropy"), other)
    base = coded.net()
    before = models.Snapshot(base)
    with pytest.raises(AdapterFileError, match=r"two masks of 'conv2\.weight'"):
        PeftModel.from_pretrained(base, str(tmp_path))
    before.assert_unchanged()


@pytest.mark.parametrize("coding", ["entropy", "context"])
def test_ones_are_counted_whether_or_not_the_masks_were_decoded_before(coding, tmp_path):
    model = coded.save(tmp_path, coding)
    chosen = {name: int(mask.sum()) for name, mask in models.masks(model).items()}
    assert coding in coded.codings(tmp_path)
    file = read_adapter_file(tmp_path / models.WEIGHTS_FILE)
    assert file.coded
    assert dict(file.ones) == chosen
    assert not file.coded
    assert dict(file.ones) == chosen
    loaded = coded.load(tmp_path).peft_config["default"].origin.file
    assert not loaded.coded  # decoded for the load, and not kept beside the model's own bits
    assert dict(loaded.ones) == chosen

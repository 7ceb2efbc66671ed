"""Damaged adapter files: refused by name, and nothing of the model moves."""

import json
import shutil
import struct
import zlib

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.adapters.files.adapter_file import read_adapter_file
from pemn_surgery.errors import (
    AdapterFileError,
    ArchitectureError,
    FingerprintError,
    MaskFormatError,
    PemnError,
)
from tests.adapters import models

CONV = "base_model.model.0.masked_weight.pemn_masks.bits"
BIAS = "base_model.model.0.task_tensors.pemn_tensors.bias"
MEAN = "base_model.model.1.task_tensors.pemn_tensors.running_mean"


def small(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 4)
        )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained adapter's folder and its logits."""
    folder = tmp_path_factory.mktemp("adapter")
    model = models.train(pemnify(small(), bank="rp"))
    model.save_pretrained(str(folder))
    return folder, models.logits(model)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def load(folder):
    return PeftModel.from_pretrained(small(seed=1), str(folder))


def header_length(content):
    return 8 + struct.unpack("<Q", content[:8])[0]


def key_places(content, key):
    """Places of one tensor's bytes within the file."""
    tensors = load_keys(content)
    start, end = tensors[key]["data_offsets"]
    return range(header_length(content) + start, header_length(content) + end)


def load_keys(content):
    return json.loads(content[8 : header_length(content)])


def mask_places(content):
    keys = [key for key in load_keys(content) if ".pemn_masks." in key]
    assert len(keys) == 2
    return [place for key in keys for place in key_places(content, key)]


def test_the_whole_file_loads(saved):
    models.assert_equal(models.logits(load(saved[0])), saved[1])


def test_every_byte_of_the_masks_is_covered(folder):
    """32 header bytes and the payload of both masks, every byte, several alterations."""
    path = folder / models.WEIGHTS_FILE
    content = path.read_bytes()
    places = mask_places(content)
    assert len(places) == (32 + 14) + (32 + 128)
    for place in places:
        for change in (0x01, 0x80):
            damaged = bytearray(content)
            damaged[place] ^= change
            path.write_bytes(bytes(damaged))
            with pytest.raises(MaskFormatError, match=r"pemn_masks.*Nothing was loaded"):
                read_adapter_file(path)


def test_altered_mask_leaves_the_base_alone(folder):
    path = folder / models.WEIGHTS_FILE
    content = path.read_bytes()
    places = mask_places(content)[::7]
    assert len(places) == 30
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(bytes(damaged))
        base = small(seed=1)
        before = models.Snapshot(base)
        with pytest.raises(PemnError):
            PeftModel.from_pretrained(base, str(folder))
        before.assert_unchanged()


def test_every_second_byte_of_the_safetensors_header(folder, saved):
    """Refused, or (metadata that nothing reads) the same logits: never another model."""
    path = folder / models.WEIGHTS_FILE
    content = path.read_bytes()
    refused, accepted, silent = 0, 0, []
    for place in range(0, header_length(content), 2):
        damaged = bytearray(content)
        damaged[place] ^= (0x01, 0x0F, 0xFF)[place // 2 % 3]
        path.write_bytes(bytes(damaged))
        try:
            model = load(folder)
        except (AdapterFileError, ArchitectureError):
            refused += 1
        except UserWarning as warning:  # PEFT's hint is no refusal: by default it only prints
            silent.append((place, str(warning)[:80]))
        else:
            same = torch.equal(models.logits(model), saved[1])
            accepted += same
            silent += [] if same else [(place, "other logits")]
    assert refused > 250
    assert accepted <= 10
    shown = [(p, content[max(8, p - 30) : p + 5], why) for p, why in silent[:3]]
    assert not silent, f"{len(silent)} alterations load another model: {shown}"


def test_truncated_at_any_length(folder):
    path = folder / models.WEIGHTS_FILE
    content = path.read_bytes()
    lengths = [*range(0, len(content), 41), len(content) - 1]
    assert len(lengths) > 25
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(AdapterFileError) as error:
            PemnConfig.from_pretrained(str(folder))
        models.says(error, models.WEIGHTS_FILE, f"({length} bytes)", "truncated", "Get the file")
    base = small(seed=1)
    before = models.Snapshot(base)
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(base, str(folder))
    before.assert_unchanged()


def test_longer_file_is_refused(folder):
    path = folder / models.WEIGHTS_FILE
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(AdapterFileError, match="truncated or altered"):
        load(folder)


def test_not_a_safetensors_file(folder):
    (folder / models.WEIGHTS_FILE).write_bytes(b"PK\x03\x04" * 300)
    with pytest.raises(AdapterFileError, match=r"\(1200 bytes\) cannot be read"):
        load(folder)


def rewrite(folder, change):
    path = folder / models.WEIGHTS_FILE
    tensors = load_file(path)
    assert {CONV, BIAS, MEAN} <= set(tensors)
    change(tensors)
    save_file(tensors, path)
    models.forget_digest(folder)


def test_missing_mask(folder):
    rewrite(folder, lambda tensors: tensors.pop(CONV))
    base = small(seed=1)
    before = models.Snapshot(base)
    with pytest.raises(ArchitectureError) as error:
        PeftModel.from_pretrained(base, str(folder))
    models.says(error, "1 differ", "0.weight: file no mask, model 108 weights", "Build the model")
    before.assert_unchanged()


@pytest.mark.parametrize("key", [BIAS, MEAN])
def test_missing_task_tensor(folder, key):
    """Without it the base's random values would silently serve instead."""
    rewrite(folder, lambda tensors: tensors.pop(key))
    base = small(seed=1)
    before = models.Snapshot(base)
    with pytest.raises((AdapterFileError, ArchitectureError)):
        PeftModel.from_pretrained(base, str(folder))
    before.assert_unchanged()


def test_task_tensor_of_another_type(folder):
    """One byte in the header makes F32 an I32: garbage values."""
    rewrite(folder, lambda tensors: tensors.update({BIAS: tensors[BIAS].view(torch.int32)}))
    with pytest.raises((AdapterFileError, ArchitectureError)):
        load(folder)


def test_task_tensor_of_another_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({BIAS: torch.zeros(5)}))
    base = small(seed=1)
    before = models.Snapshot(base)
    with pytest.raises((AdapterFileError, ArchitectureError)):
        PeftModel.from_pretrained(base, str(folder))
    before.assert_unchanged()


def test_unknown_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({BIAS + "x": torch.zeros(4)}))
    with pytest.raises((AdapterFileError, ArchitectureError)):
        load(folder)


def mask_with(stored, **changes):
    """A stored mask with fields changed and the checksum right again."""
    fields = dict(zip(
        ("magic", "version", "coding", "reserved", "weights", "checksum", "base"),
        struct.unpack("<4sBBHQI12s", bytes(stored[:32].tolist())), strict=True,
    ))  # fmt: skip
    payload = changes.pop("payload", bytes(stored[32:].tolist()))
    fields.update(changes)
    if "checksum" not in changes:  # CRC-32 of all bytes but its own four
        fields["checksum"] = 0
        content = struct.pack("<4sBBHQI12s", *fields.values()) + payload
        fields["checksum"] = zlib.crc32(content[:16] + content[20:])
    return torch.tensor(list(struct.pack("<4sBBHQI12s", *fields.values()) + payload)).byte()


def test_mask_of_another_base_within_a_fitting_file(folder):
    """The configuration fits, one mask says another base: refused before anything changes."""
    rewrite(
        folder, lambda tensors: tensors.update({CONV: mask_with(tensors[CONV], base=b"x" * 12)})
    )
    base = small(seed=1)
    before = models.Snapshot(base)
    with pytest.raises(FingerprintError, match="fingerprint"):
        PeftModel.from_pretrained(base, str(folder))
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"magic": b"PK\3\4"}, ("starts with 504b0304", "50454d4e", "get the file again")),
        ({"reserved": 1}, ("starts with 50454d4e01000100",)),
        ({"version": 2}, ("version 2", "reads 1", "upgrade pemn-surgery")),
        ({"coding": 4}, ("coding 4", "reads 0 to 3", "upgrade pemn-surgery")),
        ({"weights": 109}, ("bits set", "109")),
        ({"weights": 116}, ("has 46 bytes", "116 weights needs 47")),
        ({"checksum": 7}, ("checksum", "00000007")),
        ({"payload": bytes(13) + b"\xf0"}, ("bits set past its 108 weights",)),
    ],
)
def test_every_field_of_a_stored_mask(folder, changes, said):
    if changes == {"weights": 109}:  # the last byte holds 4 weights; a fifth makes another size
        changes, said = {"weights": 105, "payload": bytes(13) + b"\x0e"}, ("past its 105",)
    rewrite(folder, lambda tensors: tensors.update({CONV: mask_with(tensors[CONV], **changes)}))
    with pytest.raises(MaskFormatError) as error:
        load(folder)
    models.says(error, CONV, "Nothing was loaded", *said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(46), "is torch.float32 of shape (46,)"),
        (torch.zeros(2, 23, dtype=torch.uint8), "of shape (2, 23)"),
        (torch.zeros(31, dtype=torch.uint8), "has 31 bytes, its header alone needs 32"),
    ],
)
def test_not_a_stored_mask(folder, value, said):
    rewrite(folder, lambda tensors: tensors.update({CONV: value}))
    with pytest.raises(MaskFormatError) as error:
        load(folder)
    models.says(error, CONV, said, "get the file again")


def test_read_adapter_file(saved):
    folder, _ = saved
    path = folder / models.WEIGHTS_FILE
    file = read_adapter_file(path)
    model = load(folder)
    chosen = models.masks(model)
    assert file.nbytes == path.stat().st_size
    assert dict(file.sizes) == {"0.weight": 108, "3.weight": 1024}
    assert dict(file.ones) == {name: int(mask.sum()) for name, mask in chosen.items()}
    assert set(file.others) == set(load_file(path)) - {
        key for key in load_file(path) if "masks" in key
    }
    assert file.others[BIAS] == ((4,), torch.float32)

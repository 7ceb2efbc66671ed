"""Stored masks: a byte-level oracle, and one named error for every way to damage one."""

import struct
import zlib

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pemn_surgery.coding import bits
from pemn_surgery.coding.header import UNKNOWN_BASE
from pemn_surgery.errors import AdapterFileError, MaskFormatError, PemnError
from tests import oracles

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)
MASKS = SHAPES.flatmap(lambda shape: hnp.arrays(np.bool_, shape))
BASES = st.binary(min_size=12, max_size=12)


def as_bytes(stored):
    return bytes(stored.tolist())


def as_tensor(content):
    return torch.tensor(list(content), dtype=torch.uint8)


def some_mask(weights=21):
    return torch.arange(weights) % 3 != 1


@given(MASKS, BASES)
def test_bytes_are_the_documented_ones(values, base):
    mask = torch.from_numpy(values)
    stored = bits.pack(mask, base)
    assert stored.dtype == torch.uint8
    assert stored.dim() == 1
    assert as_bytes(stored) == oracles.stored_mask(values.reshape(-1).tolist(), base)
    assert stored.numel() == bits.packed_bytes(mask.numel()) == 32 + -(-mask.numel() // 8)


@given(MASKS, BASES)
def test_round_trip(values, base):
    mask = torch.from_numpy(values)
    stored = bits.pack(mask, base)
    header = bits.verify(stored, "m")
    oracles.assert_same(bits.unpack(stored, tuple(mask.shape)), mask)
    assert header.weights == mask.numel()
    assert header.base == base
    assert header.checksum == oracles.checksum(as_bytes(stored))


@given(MASKS)
def test_tensor_operations_equal_numpy(values):
    """What CUDA and torch.compile run: the path without numpy."""
    mask = torch.from_numpy(values)
    stored = bits.pack(mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(np, "unpackbits", None)  # must not be needed
        unpacked = bits.unpack(stored, tuple(mask.shape))
    oracles.assert_same(unpacked, mask)


@pytest.mark.parametrize("shape", [(3, 7), (8,), (5, 1, 3, 3)])
def test_unpack_traces_in_one_graph(shape):
    mask = some_mask(int(np.prod(shape))).view(shape)
    compiled = torch.compile(lambda s: bits.unpack(s, shape), backend="eager", fullgraph=True)
    oracles.assert_same(compiled(bits.pack(mask)), mask)


@pytest.mark.parametrize(("start", "stop"), [(0, 21), (0, 8), (8, 21), (8, 13), (16, 17), (16, 16)])
@pytest.mark.parametrize("traced", [False, True])
def test_a_piece_is_that_part_of_the_mask(start, stop, traced, monkeypatch):
    if traced:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mask = some_mask().view(-1)
    oracles.assert_same(bits.unpack_piece(bits.pack(mask), start, stop), mask[start:stop])


def test_header_layout():
    base = bytes(range(1, 13))
    content = as_bytes(bits.pack(some_mask(), base))
    payload = content[32:]
    fields = struct.unpack("<4sBBHQI12s", content[:32])
    assert fields == (b"PEMN", 1, 0, 0, 21, zlib.crc32(content[:16] + content[20:]), base)
    assert payload == bytes([0b01101101, 0b11011011, 0b00010110])


def test_unknown_base_is_zeros():
    assert as_bytes(bits.pack(some_mask()))[20:32] == bytes(12) == UNKNOWN_BASE


def test_non_contiguous_mask_is_packed_row_by_row():
    mask = some_mask(24).view(4, 6).t()
    expected = oracles.stored_mask([bool(mask[i, j]) for i in range(6) for j in range(4)])
    assert as_bytes(bits.pack(mask)) == expected


def test_a_mask_that_is_a_result_of_autograd_is_packed():
    scores = torch.nn.Parameter(torch.tensor([1.0, -1.0, 2.0]))
    assert as_bytes(bits.pack(scores > 0)) == oracles.stored_mask([True, False, True])


@given(st.integers(0, 100))
def test_empty_place_is_not_loaded(weights):
    place = bits.empty(weights)
    assert place.dtype == torch.uint8
    assert place.shape == (bits.packed_bytes(weights),)
    assert int(place.sum()) == 0
    assert bits.is_loaded(place) is False
    assert bits.is_loaded(bits.pack(torch.zeros(weights, dtype=torch.bool))) is True


def test_too_short_for_a_magic_is_not_loaded():
    assert bits.is_loaded(torch.empty(0, dtype=torch.uint8)) is False
    assert bits.is_loaded(torch.ones(3, dtype=torch.uint8)) is False


def replaced(content, place, value):
    return content[:place] + value + content[place + len(value) :]


def resealed(content):
    return replaced(content, 16, struct.pack("<I", oracles.checksum(content)))


GOOD = oracles.stored_mask(some_mask().tolist())
DAMAGED = {
    "nothing": (b"", ["0 bytes", "32"]),
    "header cut": (GOOD[:31], ["31 bytes", "32"]),
    "payload cut": (GOOD[:-1], ["34 bytes", "21 weights", "35"]),
    "payload too long": (GOOD + b"\0", ["36 bytes", "21 weights", "35"]),
    "all zero": (bytes(35), ["0000000000000000", "50454d4e"]),
    "magic": (replaced(GOOD, 0, b"PEMM"), ["50454d4d", "50454d4e"]),
    "reserved": (replaced(GOOD, 6, b"\1"), ["50454d4e01000100"]),
    "reserved, second": (replaced(GOOD, 7, b"\1"), ["50454d4e01000001"]),
    "version 0": (replaced(GOOD, 4, b"\0"), ["version 0", "reads 1", "upgrade"]),
    "version 2": (replaced(GOOD, 4, b"\2"), ["version 2", "reads 1", "upgrade"]),
    "coding": (replaced(GOOD, 5, b"\4"), ["coding 4", "reads 0 to 3", "upgrade"]),
    "count": (replaced(GOOD, 8, b"\x19"), ["35 bytes", "25 weights", "36"]),
    "count of 2^63": (replaced(GOOD, 15, b"\x80"), ["35 bytes", str(2**63 + 21)]),
    "checksum": (replaced(GOOD, 16, b"\0\0\0\0"), ["00000000", f"{oracles.checksum(GOOD):08x}"]),
    "payload bit": (replaced(GOOD, 33, b"\xda"), [f"{oracles.checksum(GOOD):08x}"]),
    "padding bit": (resealed(replaced(GOOD, 34, bytes([0b00110110]))), ["past its 21 weights"]),
    "last padding bit": (resealed(replaced(GOOD, 34, bytes([0b10010110]))), ["past its 21"]),
}


def test_the_undamaged_one_is_accepted():
    assert bits.verify(as_tensor(GOOD), "m").weights == 21


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused(name):
    content, said = DAMAGED[name]
    with pytest.raises(MaskFormatError) as caught:
        bits.verify(as_tensor(content), "layer1.weight.bits")
    message = str(caught.value)
    assert "'layer1.weight.bits'" in message
    assert "Nothing was loaded" in message
    for part in said:
        assert part in message, (part, message)


@given(st.integers(0, 35 * 8 - 1))
def test_every_flipped_bit_is_noticed(place):
    content = bytearray(GOOD)
    content[place // 8] ^= 1 << (place % 8)
    with pytest.raises(MaskFormatError, match="'m'"):
        bits.verify(as_tensor(content), "m")


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (as_tensor(GOOD).float(), ["torch.float32", "(35,)"]),
        (as_tensor(GOOD).to(torch.int8), ["torch.int8", "(35,)"]),
        (as_tensor(GOOD).view(5, 7), ["torch.uint8", "(5, 7)"]),
        (torch.tensor(3, dtype=torch.uint8), ["torch.uint8", "()"]),
    ],
)
def test_what_is_no_row_of_bytes_is_refused(stored, said):
    with pytest.raises(MaskFormatError) as caught:
        bits.verify(stored, "w")
    assert all(part in str(caught.value) for part in [*said, "'w'"]), str(caught.value)


def test_error_family():
    assert issubclass(MaskFormatError, AdapterFileError)
    assert issubclass(AdapterFileError, PemnError)
    assert issubclass(MaskFormatError, ValueError)

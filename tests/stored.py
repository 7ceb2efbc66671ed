"""Bytes of stored masks: changed, made fit again, refused."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch

from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.choice import choose
from pemn_surgery.coding.context import Guide
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.errors import MaskFormatError
from pemn_surgery.numbers.sizes import drawn_sizes
from tests import oracles


def as_bytes(stored):
    return stored.numpy().tobytes()


def as_tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def drawn(key, period, weights, log2=8):
    """A guide as its layer or its file gives it."""
    return Guide(drawn_sizes(key, period, weights), log2, (key, period))


def flags_of(mask):
    return mask.reshape(-1).numpy().view(np.uint8)


def changed(content, place, value):
    """Other bytes from a place on."""
    return content[:place] + value + content[place + len(value) :]


def resealed(content):
    """The checksum of the whole made to fit."""
    return changed(content, 16, struct.pack("<I", oracles.checksum(content)))


def by_density(mask, base=bytes(12)):
    """The form coded by density, also where bits are shorter."""
    stored = bits.pack(mask, base)
    header = bits.verify(stored, "m")
    return codec.by_density(stored.numpy()[HEADER_BYTES:], header, int(mask.sum()))


def forced(mask, guides=(), kernel=(), base=bytes(12), context=None):
    """The form coded by context, also where another is shorter."""
    header = bits.verify(bits.pack(mask, base), "m")
    chosen = context or choose(flags_of(mask), guides, kernel)
    return codec.by_context(flags_of(mask), chosen, header)


def assert_refused(content, said, most, *base_sizes):
    """A named error that says what is wrong, in ``most`` bytes, also where the checksum fits."""
    tracemalloc.start()
    with pytest.raises(MaskFormatError, match=said) as caught:
        codec.decode(as_tensor(resealed(content)), "layer1.weight", *base_sizes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "'layer1.weight'" in str(caught.value)
    assert "Nothing was loaded" in str(caught.value)
    assert peak < most


def assert_every_flipped_bit_is_noticed(content, *base_sizes):
    """By the checksum of the whole, before anything is decoded."""
    for place in range(8 * len(content)):
        altered = bytearray(content)
        altered[place // 8] ^= 1 << (place % 8)
        with pytest.raises(MaskFormatError):
            codec.decode(as_tensor(altered), "m", *base_sizes)


def assert_refused_or_the_same(content, changes, *base_sizes):
    """Whatever is decoded with a fitting checksum is the mask that was coded."""
    expected = as_bytes(codec.decode(as_tensor(content), "m", *base_sizes))
    altered = bytearray(content)
    for place, value in changes:
        altered[place % len(altered)] = value
    try:
        found = codec.decode(as_tensor(resealed(bytes(altered))), "m", *base_sizes)
    except MaskFormatError:
        return
    assert as_bytes(found)[32:] == expected[32:]  # the base's name says nothing

"""Slow and obvious counterparts of the fast code, written from the papers' equations."""

import hashlib
import struct
import zlib

import torch

MASK_64 = (1 << 64) - 1


def assert_same(actual, expected):
    """Equal to the last bit: type, shape and every value."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert tuple(actual.shape) == tuple(expected.shape), (actual.shape, expected.shape)
    different = (actual != expected).sum()
    assert int(different) == 0, f"{int(different)} of {expected.numel()} values differ"


def assert_near(actual, expected, tolerance):
    """Equal but for rounding, relative to the largest expected magnitude."""
    assert tuple(actual.shape) == tuple(expected.shape), (actual.shape, expected.shape)
    size = max(float(expected.detach().abs().max()), 1e-30)
    error = float((actual.detach().double() - expected.detach().double()).abs().max()) / size
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"


def philox_block(counter, key):
    """Philox-4x64-10 (Salmon et al. 2011, section 3.3) in Python integers: four words."""
    key = list(key)
    for _ in range(10):
        first = 0xD2E7470EE14C6C93 * counter[0]
        second = 0xCA5A826395121157 * counter[2]
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & MASK_64,
            (first >> 64) ^ counter[3] ^ key[1],
            first & MASK_64,
        ]
        key[0] = (key[0] + 0x9E3779B97F4A7C15) & MASK_64
        key[1] = (key[1] + 0xBB67AE8584CAA73B) & MASK_64
    return counter


def integers(seed, stream, count):
    """Low half, then high half of every Philox word; the key is a hash of seed and stream."""
    digest = hashlib.sha256(b"pemn:" + str(seed).encode() + b":" + stream.encode()).digest()
    key = struct.unpack("<QQ", digest[:16])
    halves, block = [], 0
    while len(halves) < count:
        block += 1  # the first block has counter 1
        for word in philox_block([block, 0, 0, 0], key):
            halves += [word & 0xFFFFFFFF, word >> 32]
    return halves[:count]


def stored_mask(flags, base=bytes(12)):
    """A stored mask as bytes, bit by bit, from the table at the head of bits.py."""
    payload = bytearray((len(flags) + 7) // 8)
    for place, flag in enumerate(flags):
        if flag:
            payload[place // 8] |= 1 << (place % 8)
    head = b"PEMN" + bytes([1, 0]) + b"\0\0" + len(flags).to_bytes(8, "little")
    content = head + bytes(4) + base + bytes(payload)
    return head + checksum(content).to_bytes(4, "little") + base + bytes(payload)


def checksum(content):
    """CRC-32 of a stored mask without the four bytes that hold it."""
    return zlib.crc32(content[:16] + content[20:])


def topk(scores, density):
    """Sort by (|S|, index); the first int((1 - density) * n) are dropped (PEMN, section 3.1)."""
    values = [abs(value) for value in scores.detach().double().reshape(-1).tolist()]
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    flags = [True] * len(values)
    for place in order[: int((1 - density) * len(values))]:
        flags[place] = False
    return torch.tensor(flags, dtype=torch.bool).view(scores.shape)


def threshold(scores, mu):
    """M = 1[S > mu], one by one."""
    flags = [value > mu for value in scores.detach().double().reshape(-1).tolist()]
    return torch.tensor(flags, dtype=torch.bool).view(scores.shape)


def tiled(vector, count):
    """The vector over and over, cut to ``count`` values."""
    return [vector[place % len(vector)] for place in range(count)]


def ste_grads(weight, scores, masks, upstream, by_magnitude, scaled):
    """Gradients of sum(upstream * W * M1 * c1 * M2 * c2 ...) with respect to every score.

    Autograd sees float masks that ask for gradients: the mean in c = mean(M)^-1/2 is part of the
    graph. Straight-through: dL/dS = dL/dM, times d|S|/dS where the mask is chosen from |S|.
    """
    leaves = [mask.to(torch.float64).requires_grad_() for mask in masks]
    value = weight.double()
    for leaf in leaves:
        value = value * leaf
        if scaled:
            value = value / torch.sqrt(leaf.mean())
    (value * upstream.double()).sum().backward()
    return value.detach(), [
        leaf.grad * torch.sign(score.detach().double()) if by_magnitude else leaf.grad
        for leaf, score in zip(leaves, scores, strict=True)
    ]


def sgd(parameters, grads, state, lr, momentum, decay):
    """SGD with momentum: v = m v + (g + decay p), p = p - lr v."""
    for place, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        step = grad + decay * parameter
        velocity = step if place not in state else momentum * state[place] + step
        state[place] = velocity
        parameter -= lr * velocity


def adamw(parameters, grads, state, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    """AdamW (Loshchilov and Hutter 2019); decay 0 is Adam."""
    state["t"] = state.get("t", 0) + 1
    for place, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        mean, square = state.get(place, (torch.zeros_like(grad), torch.zeros_like(grad)))
        mean = betas[0] * mean + (1 - betas[0]) * grad
        square = betas[1] * square + (1 - betas[1]) * grad * grad
        state[place] = mean, square
        parameter *= 1 - lr * decay
        unbiased = mean / (1 - betas[0] ** state["t"])
        spread = torch.sqrt(square / (1 - betas[1] ** state["t"])) + eps
        parameter -= lr * unbiased / spread

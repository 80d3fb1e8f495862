"""Seeded hashing: everything random about the data is a hash of what it is for, so it is the same anywhere, in any order, in any version.

`mix` is the finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit words whose outputs for consecutive inputs pass
statistical tests.
"""

import hashlib

import numpy as np

MASK = (1 << 64) - 1


def digest(*parts: object) -> int:
    """64 bits that depend on every part."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(word: int) -> int:
    """A bijection of 64-bit words."""
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def mix_range(key: int, size: int) -> np.ndarray:
    """mix(key + i) for i = 0 ... size - 1: uint64 [size]."""
    word = np.arange(size, dtype=np.uint64) + np.uint64((key + 0x9E3779B97F4A7C15) & MASK)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def shuffled(key: int, size: int) -> np.ndarray:
    """0 ... size - 1 in an order the key decides: int64 [size]."""
    return np.argsort(mix_range(key, size), kind="stable")


def permuted(index: int, size: int, key: int) -> int:
    """Where a keyed permutation of 0 ... size - 1 sends `index`, without building it.

    A Feistel network on the smallest power of two that holds `size`, walked until it lands inside (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"): fewer than two walks on average.
    """
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    low_mask, high_mask = (1 << low) - 1, (1 << (bits - low)) - 1
    while True:
        high, rest = index >> low, index & low_mask
        for step in range(0, 8, 2):
            high ^= mix(key + (step << 56) + rest) & high_mask
            rest ^= mix(key + ((step + 1) << 56) + high) & low_mask
        index = high << low | rest
        if index < size:
            return index

"""Damage to bytes: what disks, networks and people with intentions do to files."""

import random

__all__ = ["damaged"]

_NUMBERS = (0, 1, -1, 2**7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return ``content`` with one to four kinds of damage."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice(_DAMAGE)(data, chance)
    return bytes(data)


def _place(data: bytearray, chance: random.Random) -> int:
    # Headers are at the beginning or the end, and what they say matters most.
    end = len(data)
    near = min(end, chance.choice((16, 64, 512, end)))
    return (
        chance.randrange(near or 1) if chance.random() < 0.7 else end - 1 - chance.randrange(near)
    )


def _flip(data: bytearray, chance: random.Random) -> None:
    if data:
        data[_place(data, chance)] ^= 1 << chance.randrange(8)


def _overwrite(data: bytearray, chance: random.Random) -> None:
    if data:
        start = _place(data, chance)
        length = chance.choice((1, 2, 4, 8, 64))
        data[start : start + length] = chance.randbytes(length)


def _number(data: bytearray, chance: random.Random) -> None:
    size = chance.choice((1, 2, 4, 8))
    value = chance.choice(_NUMBERS) % 2 ** (8 * size)
    start = _place(data, chance) if data else 0
    data[start : start + size] = value.to_bytes(size, chance.choice(("little", "big")))


def _digits(data: bytearray, chance: random.Random) -> None:
    """Change a number that stands there as text."""
    places = [i for i, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
    if places:
        start = chance.choice(places)
        data[start : start + 1] = str(chance.choice(_NUMBERS)).encode()


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _remove(data: bytearray, chance: random.Random) -> None:
    if data:
        start = _place(data, chance)
        del data[start : start + chance.choice((1, 4, 16, 256))]


def _repeat(data: bytearray, chance: random.Random) -> None:
    if data:
        start = _place(data, chance)
        piece = data[start : start + chance.choice((1, 8, 64, 1024))]
        data[start:start] = piece * chance.choice((1, 2, 16))


def _append(data: bytearray, chance: random.Random) -> None:
    data += chance.randbytes(chance.choice((1, 100, 5000)))


_DAMAGE = (_flip, _flip, _overwrite, _number, _number, _digits, _cut, _remove, _repeat, _append)

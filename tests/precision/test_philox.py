"""The random bits: Philox's published answers, and independence of how elements are cut up."""

import torch

from model.precision.philox import Stream, philox, random_bytes, stream_key

# Known answers of the Random123 distribution, philox4x32-10: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_published_answers() -> None:
    for counter, key, expected in KNOWN:
        words = philox(tuple(torch.tensor(c) for c in counter), key)  # type: ignore[arg-type]
        assert tuple(int(word) for word in words) == expected


def draw(**changes: object) -> torch.Tensor:
    arguments: dict = {
        "sample": torch.arange(6).repeat_interleave(8) + (1 << 31),
        "position": torch.arange(8).repeat(6),
        "step": 3,
        "features": 40,
    }
    return random_bytes(stream_key(1, "layers.0.mixer.in_proj", "dy"), **{**arguments, **changes})


def test_rows_and_features_may_be_cut_anywhere() -> None:
    whole = draw()
    sample, position = torch.arange(6).repeat_interleave(8) + (1 << 31), torch.arange(8).repeat(6)
    assert torch.equal(draw(sample=sample[10:30], position=position[10:30]), whole[10:30])
    for first, count in ((0, 16), (16, 24), (5, 30), (37, 3)):
        assert torch.equal(draw(first_feature=first, features=count), whole[:, first : first + count])


def test_every_coordinate_matters() -> None:
    base = draw()
    rows = torch.zeros(48, dtype=torch.int64)
    others = [
        draw(step=4),
        draw(sample=torch.arange(6).repeat_interleave(8)),
        draw(position=torch.arange(8).repeat(6) + 1),
        draw(first_feature=1),
        draw(expert=rows),
        draw(expert=rows + 1),
        random_bytes(stream_key(2, "layers.0.mixer.in_proj", "dy"), sample=rows, position=rows, step=3, features=40),
        random_bytes(stream_key(1, "layers.1.mixer.in_proj", "dy"), sample=rows, position=rows, step=3, features=40),
        random_bytes(stream_key(1, "layers.0.mixer.in_proj", "dy_t"), sample=rows, position=rows, step=3, features=40),
    ]
    for index, other in enumerate(others):
        assert (base == other).float().mean() < 0.05, index
        for second in others[:index]:
            assert not torch.equal(other, second)


def test_bytes_are_uniform_and_neighbours_uncorrelated() -> None:
    n = 1 << 10
    values = random_bytes(
        stream_key(7, "m", "dy"), sample=torch.zeros(n, dtype=torch.int64), position=torch.arange(n), step=0, features=1024
    )
    counts = torch.bincount(values.flatten().int(), minlength=256).double()
    expected = values.numel() / 256
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5
    centred = values.double() - 127.5
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        correlation = float((a * b).mean() / centred.var())
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_streams_of_other_modules_operands_steps_and_seeds_are_independent() -> None:
    index = torch.arange(256)

    def drawn(seed: int = 1, module: str = "layers.0.mixer.in_proj", operand: str = "dy", step: int = 5, sample: int = 0) -> torch.Tensor:
        return Stream(stream_key(seed, module, operand), index // 64 + sample, index % 64, step).bytes(512).flatten().double()

    first = drawn()
    others = {
        "operand": drawn(operand="dy_t"),
        "next step": drawn(step=6),
        "far step": drawn(step=5 + 2**20),
        "next layer": drawn(module="layers.1.mixer.in_proj"),
        "other module": drawn(module="layers.0.mixer.out_proj"),
        "next seed": drawn(seed=2),
        "next sample": drawn(sample=4),
    }
    variance = (256**2 - 1) / 12  # variance of a uniform byte
    for what, other in others.items():
        # Also shifted by a few elements: a counter that only moved would show there.
        for shift in (0, 1, 4, 16, 512):
            correlation = float(((first - 127.5) * (other.roll(shift) - 127.5)).mean() / variance)
            assert abs(correlation) < 5 / first.numel() ** 0.5, (what, shift)
        # Equal bytes are as frequent as chance makes them.
        equal = float((first == other).double().mean())
        assert abs(equal - 1 / 256) < 5 * (1 / 256 / first.numel()) ** 0.5, what

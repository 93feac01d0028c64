"""Where exits stand: closed forms over all small cases, and every refusal."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from eetrain.errors import CheckpointError, ConfigError
from eetrain.exits import ExitConfig
from eetrain.exits.placement import resolve_layers


def test_every_nth_block_below_the_last():
    for blocks, every in itertools.product(range(1, 13), range(1, 14)):
        want = tuple(layer for layer in range(1, blocks) if layer % every == 0)
        assert resolve_layers(blocks, every=every) == want


def test_explicit_layers_in_any_order():
    for blocks in range(1, 6):
        for count in range(blocks + 1):
            for layers in itertools.permutations(range(1, blocks + 1), count):
                assert resolve_layers(blocks, layers=layers) == tuple(sorted(layers))


def test_fractions_round_half_up():
    for blocks in range(1, 13):
        for numerator in range(1, 9):
            exact = Fraction(numerator, 8) * blocks
            want = int(exact + Fraction(1, 2))  # floor of a positive number
            if want == 0:
                with pytest.raises(ConfigError, match=r"\[0\] outside 1"):
                    resolve_layers(blocks, fractions=[numerator / 8])
            else:
                assert resolve_layers(blocks, fractions=[numerator / 8]) == (want,)
    assert resolve_layers(12, fractions=[0.5, 0.25, 1.0]) == (3, 6, 12)


def test_exactly_one_way_of_placing():
    given = {"layers": [1], "every": 2, "fractions": [0.5]}
    for count in (0, 2, 3):
        for names in itertools.combinations(given, count):
            with pytest.raises(ConfigError) as caught:
                resolve_layers(4, **{name: given[name] for name in names})
            found = " and ".join(names) or "nothing"
            assert caught.value.message == (
                f"Exit placement: {found} set; exactly one of layers, every, fractions counts."
            )
            assert "exits.every=4" in caught.value.hint


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"layers": [0]}, "Exits after blocks [0]: [0] outside 1..4, the blocks of this backbone."),
        ({"layers": [2, 5, -1]}, "Exits after blocks [2, 5, -1]: [5, -1] outside 1..4, the blocks of this backbone."),
        ({"layers": [3, 1, 3]}, "Exits after blocks [3, 1, 3]: [3] named more than once."),
        ({"fractions": [0.5, 0.55]}, "Exits after blocks [2, 2]: [2] named more than once."),
        ({"fractions": [1.5]}, "Exits after blocks [6]: [6] outside 1..4, the blocks of this backbone."),
        ({"every": 0}, "exits.every=0, must be at least 1."),
        ({"every": -2}, "exits.every=-2, must be at least 1."),
    ],
)
def test_placements_outside_the_backbone(placement, message):
    with pytest.raises(ConfigError) as caught:
        resolve_layers(4, **placement)
    assert caught.value.message == message
    assert caught.value.hint


def test_settings_are_checked_when_made():
    with pytest.raises(ConfigError) as caught:
        ExitConfig(layers=[1], head="linear")
    assert str(caught.value) == "exits.head='linear' is not known. HINT: One of: tied, norm, mlp, block."
    with pytest.raises(ConfigError) as caught:
        ExitConfig(layers=[1], output="shared")
    assert str(caught.value) == "exits.output='shared' is not known. HINT: One of: tied, own."
    with pytest.raises(ConfigError, match=r"head=tied has no parameters, but exits.output=own asks") as caught:
        ExitConfig(layers=[1], head="tied", output="own")
    assert "exits.head=norm with exits.output=own" in caught.value.hint


def test_resolved_settings_survive_the_checkpoint():
    for head, output in itertools.product(("tied", "norm", "mlp", "block"), ("tied", "own")):
        if (head, output) == ("tied", "own"):
            continue
        for placement in ({"layers": [3, 1]}, {"every": 2}, {"fractions": [0.25]}, {"layers": []}):
            given = ExitConfig(**placement, head=head, output=output)
            resolved = given.resolved(8)
            assert resolved.layers == list(resolve_layers(8, **placement))
            assert (resolved.every, resolved.fractions) == (None, None)
            assert resolved.resolved(8) == resolved
            assert ExitConfig.from_dict(resolved.to_dict()) == resolved
    with pytest.raises(AssertionError):
        ExitConfig(every=2).to_dict()


def test_settings_of_a_later_version_are_refused():
    with pytest.raises(CheckpointError, match="this version does not know: gate, router") as caught:
        ExitConfig.from_dict({"layers": [1], "router": 1, "gate": 2})
    assert "newer" in caught.value.hint

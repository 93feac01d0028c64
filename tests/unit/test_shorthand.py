"""One-line objects: reading, writing, and what the reader says of a line it cannot read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest

from eetrain.errors import ConfigError
from eetrain.shorthand import Form, integers, numbers, parse, spell, truth


@dataclass(frozen=True)
class Kite:
    """Has a value, which stands without its name."""

    size: float
    tails: tuple[int, ...] = ()
    red: bool = False
    note: str = "none"


@dataclass(frozen=True)
class Stone:
    """Has none."""

    mass: int | None = None


FORMS = {
    "kite": Form(Kite, "size", {"size": float, "tails": integers, "red": truth, "note": str}),
    "stone": Form(Stone, None, {"mass": int}),
}


def read(text):
    return parse(text, FORMS, "Toy", "kite:3 or stone")


@pytest.mark.parametrize(
    ("text", "thing"),
    [
        ("stone", Stone()),
        ("stone:", Stone()),
        ("stone:mass=3", Stone(3)),
        ("stone,mass=3", Stone(3)),
        ("kite:3", Kite(3.0)),
        ("kite:size=3", Kite(3.0)),
        ("kite,size=3", Kite(3.0)),
        ("kite:red=true,size=3", Kite(3.0, red=True)),
        (" kite:3 , red=true , tails=1+2 ", Kite(3.0, (1, 2), True)),
        ("kite:3,note=a=b:c", Kite(3.0, note="a=b:c")),
        ("kite:-1e-3", Kite(-0.001)),
    ],
)
def test_lines(text, thing):
    assert read(text) == thing


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is none of kite, stone"),
        ("kit:3", "'kit' is none of kite, stone"),
        ("kite", "'kite' needs a value"),
        ("kite:red=true", "'kite' needs a value"),
        ("kite:3,size=4", "'size' is not an option of 'kite', or stands there twice"),
        ("kite:3,red=true,red=true", "'red' is not an option of 'kite', or stands there twice"),
        ("kite:3,4", "'4' is not an option of 'kite', or stands there twice"),
        ("kite:3,colour=red", "'colour' is not an option of 'kite', or stands there twice"),
        ("kite:3,red", "red='' is not readable"),
        ("kite:3,red=True", "red='True' is not readable"),
        ("kite:3,tails=", "tails='' is not readable"),
        ("kite:3,tails=1+", "tails='1+' is not readable"),
        ("kite:big", "size='big' is not readable"),
        ("stone:3", "'stone' takes no value"),
        ("stone:mass=3.5", "mass='3.5' is not readable"),
    ],
)
def test_lines_that_cannot_be_read(text, why):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value) == f"Toy {text!r} does not parse: {why}. HINT: For example kite:3 or stone."


def test_errors_of_the_object_itself_come_through():
    def broken(mass):
        raise ConfigError("too heavy.", hint="Less.")

    forms = {"stone": Form(broken, None, {"mass": int})}
    with pytest.raises(ConfigError, match=r"^too heavy\. HINT: Less\.$"):
        parse("stone:mass=3", forms, "Toy", "stone")


def test_what_is_spelled_is_read_back():
    for size, tails, red, note in product((0.5, 1 / 3, 1e-9, 12345678.9), ((4,), (1, 2, 3)), (True, False), ("x", "")):
        kite = Kite(size, tails, red, note)
        assert read(spell("kite", kite, "size")) == kite
    assert read(spell("stone", Stone(7), None)) == Stone(7)


def test_spelling_leaves_defaults_out_and_is_short():
    assert spell("stone", Stone(), None) == "stone"
    assert spell("stone", Stone(2), None) == "stone:mass=2"
    assert spell("kite", Kite(3.0), "size") == "kite:3"
    assert spell("kite", Kite(0.25, (1, 2), True, "x"), "size") == "kite:0.25,tails=1+2,red=true,note=x"
    assert spell("kite", Kite(1 / 3), "size") == "kite:0.3333333333333333"


def test_readers():
    assert integers("3+6") == (3, 6)
    assert numbers("0.5") == (0.5,)
    assert numbers("0.5+1e-3") == (0.5, 0.001)
    assert (truth("true"), truth("false")) == (True, False)
    for text in ("True", "1", ""):
        with pytest.raises(ValueError, match=f"^{text}$"):
            truth(text)

"""Dotted fields: what is written comes back, and what is wrong is named."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taca_jax.config.fields import difference, fields_of, nearest, show, update
from taca_jax.config.json_text import from_json, to_json
from taca_jax.errors import UserError


@dataclass(frozen=True)
class Inner:
    """A group.

    rank: how much of it,
      in two lines.
    low, high: the ends.
    """

    rank: int = 4
    low: float = 0.0
    high: float = 1.0
    names: tuple[str, ...] = ("q", "k")

    def __post_init__(self):
        if self.low > self.high:
            raise UserError(f"low is {self.low}; it must be at most high={self.high}")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}")


@dataclass(frozen=True)
class Needy:
    size: int
    depth: int


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    extra: Inner | None = None
    needy: Needy | None = None
    kind: Literal["plain", "none"] = "plain"
    on: bool = False
    limit: float | None = None
    note: str | None = None
    sides: tuple[int, int] = (1, 2)


OUTER = Outer("x")


def test_fields_have_dotted_names_types_defaults_and_documentation():
    fields = fields_of(Outer)
    assert list(fields)[:4] == ["name", "inner", "inner.rank", "inner.low"]
    assert fields["inner.rank"].doc == "how much of it, in two lines."
    assert fields["inner.low"].doc == fields["inner.high"].doc == "the ends."
    assert fields["extra.rank"].default == 4
    assert fields["name"].default is fields["needy.size"].default is dataclasses.MISSING
    assert fields["extra"].optional
    assert not fields["inner"].optional
    assert fields["needy"].group is Needy


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("inner.rank", "64", 64),
        ("inner.low", "-1e-3", -1e-3),
        ("inner.low", "0", 0.0),
        ("inner.names", "a, b,c", ("a", "b", "c")),
        ("inner.names", '["a, b", "-c"]', ("a, b", "-c")),
        ("inner.names", "", ()),
        ("on", "true", True),
        ("on", "False", False),
        ("limit", "0.5", 0.5),
        ("limit", "None", None),
        ("note", "none", None),
        ("note", "--help", "--help"),
        ("note", "a=b", "a=b"),
        ("name", "none", "none"),
        ("name", "", ""),
        ("kind", "none", "none"),
        ("sides", "(3,4)", (3, 4)),
        ("extra", "none", None),
        ("extra.rank", "2", 2),
    ],
)
def test_text_becomes_a_value_of_the_fields_type(key, text, value):
    result = update(OUTER, {key: text})
    for part in key.split("."):
        result = getattr(result, part)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner.rank": "abc"}, "inner.rank=abc: expected an integer"),
        ({"inner.rank": "6.5"}, "inner.rank=6.5: expected an integer"),
        ({"inner.rank": "none"}, "inner.rank=none: expected an integer"),
        ({"limit": "abc"}, "limit=abc: expected a number or none"),
        ({"on": "yes"}, "on=yes: expected true or false"),
        ({"kind": "fancy"}, "kind=fancy: expected one of plain, none"),
        ({"sides": "1"}, "sides=1: expected a comma list of 2: an integer, an integer"),
        ({"inner.names": '["a'}, 'inner.names=["a: expected a comma list, each text'),
        ({"inner.rnk": "1"}, "unknown key inner.rnk; did you mean inner.rank?"),
        ({"rank": "1"}, "unknown key rank; did you mean inner.rank?"),
        ({"name.rank": "1"}, "unknown key name.rank; did you mean"),
        ({"inner": "none"}, "inner=none: inner is a group; set one of inner.rank, "),
        ({"extra": "5"}, "or extra=none"),
        ({"extra": "none", "extra.rank": "1"}, "extra=none and extra.rank exclude each other"),
        ({"needy.size": "1"}, "needy is none here, so it needs all of its values: add needy.depth"),
        ({"inner.low": "2"}, "low is 2.0; it must be at most high=1.0"),
        ({"inner.rank": "0"}, "inner: rank is 0"),
    ],
)
def test_wrong_text_is_one_line_that_names_key_value_and_expectation(values, message):
    with pytest.raises(UserError) as error:
        update(OUTER, values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_values_that_only_fit_together_can_be_given_together():
    assert update(OUTER, {"inner.low": "2", "inner.high": "3"}).inner.low == 2.0


def test_a_group_that_is_none_is_made_from_what_is_given():
    made = update(OUTER, {"needy.size": "1", "needy.depth": "2", "extra.rank": "9"})
    assert made.needy == Needy(1, 2)
    assert made.extra == Inner(rank=9)
    assert OUTER.extra is None


outers = st.builds(
    Outer,
    name=st.text(),
    inner=st.builds(
        Inner,
        rank=st.integers(1, 9),
        low=st.floats(-9, 0),
        high=st.floats(0, 9),
        names=st.lists(st.text()).map(tuple),
    ),
    extra=st.none() | st.builds(Inner, rank=st.integers(1, 9)),
    needy=st.none() | st.builds(Needy, size=st.integers(), depth=st.integers()),
    kind=st.sampled_from(["plain", "none"]),
    on=st.booleans(),
    limit=st.none() | st.floats(allow_nan=False),
    note=st.none() | st.text() | st.sampled_from(["none", "None", "null"]),
    sides=st.tuples(st.integers(), st.integers()),
)


@given(outers)
def test_json_gives_the_same_configuration_back(outer):
    assert from_json(Outer, to_json(outer)) == outer


def test_in_json_the_word_none_is_text_and_null_is_none():
    for note in ("none", "None", "null", None):
        outer = dataclasses.replace(OUTER, note=note)
        assert from_json(Outer, to_json(outer)).note == note
    assert update(OUTER, {"note": "none"}).note is None  # as a word it is None


@given(outers, outers)
def test_difference_names_the_fields_that_differ(a, b):
    assert difference(a, a) == {}
    differing = difference(a, b)
    assert (differing == {}) == (a == b)
    assert ("inner.rank" in differing) == (a.inner.rank != b.inner.rank)
    assert ("extra" in differing) == ((a.extra is None) != (b.extra is None))
    assert all(mine != other for mine, other in differing.values())


def test_difference_says_both_values():
    other = update(OUTER, {"inner.rank": "8", "extra.rank": "2"})
    assert difference(OUTER, other) == {"inner.rank": (4, 8), "extra": (None, Inner(rank=2))}


@given(outers)
def test_a_tuple_is_shown_as_it_can_be_given(outer):
    names = outer.inner.names
    assert update(OUTER, {"inner.names": show(names)}).inner.names == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {"rnk": 1}}, "run.json: unknown key inner.rnk; did you mean inner.rank?"),
        ({"on": 1}, "run.json: on=1: expected true or false"),
        ({"on": "true"}, 'run.json: on="true": expected true or false'),
        ({"name": None}, "run.json: name=null: expected text"),
        ({"name": 3}, "run.json: name=3: expected text"),
        ({"limit": "none"}, 'run.json: limit="none": expected a number or none'),
        ({"limit": True}, "run.json: limit=true: expected a number or none"),
        ({"kind": None}, "run.json: kind=null: expected one of plain, none"),
        ({"sides": [1, 2.5]}, "run.json: sides=[1, 2.5]: expected a comma list of 2"),
        ({"sides": [1]}, "run.json: sides=[1]: expected a comma list of 2"),
        ({"sides": "1,2"}, 'run.json: sides="1,2": expected a comma list of 2'),
        ({"inner": {"rank": "many"}}, 'run.json: inner.rank="many": expected an integer'),
        ({"inner": 3}, "run.json: inner is 3; expected an object"),
        ({"inner": {"low": 2}}, "run.json: low is 2.0; it must be at most"),
        ({"needy": {"size": 1}}, "run.json: needy.depth missing"),
    ],
)
def test_json_that_was_spoilt_is_refused_with_its_place(change, message):
    tree = json.loads(to_json(OUTER)) | change
    with pytest.raises(UserError) as error:
        from_json(Outer, json.dumps(tree), "run.json")
    assert message in str(error.value)


def test_a_whole_number_in_json_may_stand_for_any_number():
    limit = from_json(Outer, json.dumps(json.loads(to_json(OUTER)) | {"limit": 3})).limit
    assert (limit, type(limit)) == (3.0, float)


def test_a_cut_off_json_is_refused():
    with pytest.raises(UserError, match=r"run\.json is not JSON"):
        from_json(Outer, to_json(OUTER)[:40], "run.json")


def test_nearest_puts_the_most_alike_first():
    assert nearest("shapes_tca", ["flux", "shapes_base", "shapes_taca"])[0] == "shapes_taca"
    assert nearest("rate", ["warmup.step", "optimizer.rate"])[0] == "optimizer.rate"

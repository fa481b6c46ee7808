import json

import pytest

from hfslim.anatomy.structure import Entry, Structure


def _structure(kept=(0, 2)):
    return Structure.of({"heads": {"a": (kept, 4)}, "neurons": {"b": (range(3), 3)}})


def test_kept_units_are_ordered_and_readable_by_site():
    assert _structure((2, 0)).kept("heads", "a") == (0, 2)


def test_unknown_site_is_named():
    with pytest.raises(KeyError, match="no layers at 'a'"):
        _structure().kept("layers", "a")


def test_equal_structures_share_hash_and_digest_whatever_their_order():
    one = Structure((Entry("heads", "a", (0,), 2), Entry("heads", "b", (1,), 2)))
    two = Structure((Entry("heads", "b", (1,), 2), Entry("heads", "a", (0,), 2)))
    assert one == two
    assert hash(one) == hash(two)
    assert one.digest() == two.digest()


def test_any_difference_changes_the_digest():
    digests = {_structure(kept).digest() for kept in [(), (0,), (1,), (0, 1), (0, 1, 2, 3)]}
    assert len(digests) == 5


def test_dictionary_survives_json():
    text = json.dumps(_structure().to_dict())
    assert json.loads(text) == {
        "heads": {"a": {"kept": [0, 2], "total": 4}},
        "neurons": {"b": {"kept": [0, 1, 2], "total": 3}},
    }
    assert Structure.from_dict(json.loads(text)) == _structure()


def test_table_and_counts_add_up():
    structure = _structure()
    assert structure.table() == [
        {"kind": "heads", "path": "a", "kept": 2, "total": 4},
        {"kind": "neurons", "path": "b", "kept": 3, "total": 3},
    ]
    assert structure.counts() == {"heads": (2, 4), "neurons": (3, 3)}
    assert str(structure) == "2/4 heads, 3/3 neurons"


def test_full_means_that_nothing_is_removed():
    assert _structure(range(4)).is_full
    assert not _structure().is_full


def test_within_compares_unit_by_unit():
    assert _structure((0,)).within(_structure((0, 2)))
    assert not _structure((1,)).within(_structure((0, 2)))
    assert not Structure.of({}).within(_structure())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("tails", "a", (0,), 4), "unknown kind of unit 'tails'"),
        (("heads", "a", (0, 0), 4), "unique and ascending"),
        (("heads", "a", (1, 0), 4), "unique and ascending"),
        (("heads", "a", (0, 4), 4), r"must lie in \[0, 4\), got 0 to 4"),
        (("heads", "a", (-1, 0), 4), r"must lie in \[0, 4\)"),
    ],
)
def test_impossible_entries_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        Entry(*entry)


def test_a_site_may_come_once_only():
    with pytest.raises(ValueError, match="each site once"):
        Structure((Entry("heads", "a", (0,), 2), Entry("heads", "a", (1,), 2)))

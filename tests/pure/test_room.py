"""Does a guest, with all that it may come to write, fit beside the others and leave something free?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.dht.store import MIN_FREE
from p2pgrid.errors import NoSpace, Refused
from p2pgrid.node.room import INPUTS_MAX, check_fits, check_inputs, offered, reservation, store_room

GIB = 1 << 30
sizes = st.integers(0, 100 * GIB)


def test_a_guest_is_counted_with_its_scratch_disk_and_the_changes_of_its_boot_disk():
    assert reservation(scratch=8 * GIB, base=2 * GIB, overlay=16 * GIB) == 10 * GIB
    assert reservation(scratch=8 * GIB, base=100 * GIB, overlay=16 * GIB) == 24 * GIB
    assert reservation(scratch=20 * GIB, base=100 * GIB, overlay=16 * GIB) == 40 * GIB


def test_what_is_promised_is_not_offered_again():
    assert offered(free=30 * GIB, reserved=0) == 30 * GIB - MIN_FREE
    assert offered(free=30 * GIB, reserved=24 * GIB) == 6 * GIB - MIN_FREE
    assert offered(free=10 * GIB, reserved=24 * GIB) == 0


def test_the_store_takes_what_its_owner_and_the_disk_allow():
    assert store_room(None, used=5 * GIB, free=30 * GIB) == 30 * GIB - MIN_FREE
    assert store_room(8 * GIB, used=5 * GIB, free=30 * GIB) == 3 * GIB
    assert store_room(8 * GIB, used=5 * GIB, free=2 * GIB) == 2 * GIB - MIN_FREE
    assert store_room(8 * GIB, used=9 * GIB, free=30 * GIB) == 0


@given(inputs=sizes, guest=sizes, free=sizes, reserved=sizes)
def test_what_fits_leaves_room_for_the_others_and_a_rest(inputs, guest, free, reserved):
    left = free - guest - 2 * inputs - reserved
    if left >= MIN_FREE or guest + inputs == 0:
        check_fits(inputs, guest, free, reserved, "here")
    else:
        with pytest.raises(NoSpace) as full:
            check_fits(inputs, guest, free, reserved, "here")
        assert full.value.wanted > full.value.free


def test_inputs_of_ten_tebibytes_are_refused():
    check_inputs(INPUTS_MAX)
    with pytest.raises(Refused):
        check_inputs(INPUTS_MAX + 1)
    with pytest.raises(Refused):
        check_inputs(10 << 40)

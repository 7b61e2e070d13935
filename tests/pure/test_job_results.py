"""Is it known before a job runs that its results would have nowhere to go?"""

import pytest

from p2pgrid.errors import Conflict
from p2pgrid.node import show
from p2pgrid.node.disks import too_few
from p2pgrid.node.results import check_free


def test_a_folder_with_room_is_fine(tmp_path):
    check_free(tmp_path / "none", [0, 1])
    check_free(tmp_path, [0, 1])
    (tmp_path / "2").mkdir()
    (tmp_path / "notes").write_text("mine")
    check_free(tmp_path, range(2))


def test_what_is_there_is_named_before(tmp_path):
    (tmp_path / "7").mkdir()
    with pytest.raises(Conflict, match="7; name another"):
        check_free(tmp_path, range(10_000))
    (tmp_path / "file").write_text("")
    with pytest.raises(Conflict, match="no folder"):
        check_free(tmp_path / "file", [0])


def test_results_that_could_not_be_written_are_told():
    said = show.results({
        "folder": "x", "tasks": 1, "files": 2, "bytes": 3,
        "failed": [{"index": 4, "why": "it is not here", "exit_code": 3}],
    })  # fmt: skip
    assert said.splitlines()[1] == "the result of task 4 could not be written: it is not here"


@pytest.mark.parametrize(
    ("wished", "able", "workers", "said"),
    [
        (1, 1, 0, ""),
        (3, 3, 2, ""),
        (3, 2, 1, "2 of 3 copies are possible with 1 worker online; waiting for more to join"),
        (9, 1, 0, "1 of 9 copies are possible with 0 workers online; waiting for more to join"),
    ],
)
def test_too_few_workers_for_the_copies_are_told(wished, able, workers, said):
    assert too_few(wished, able, workers) == said

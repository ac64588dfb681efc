"""A few writes for which there is no room, of which `python -m tests.faults.full_disk` has all; and what it notices."""

import pytest

from tests.faults import full_disk
from tests.faults.kills import Wrong

WHAT = "error: out/config.json: cannot be written (No space left on device: some)"


class Ended:
    def __init__(self, errors):
        self.errors = errors


@pytest.mark.parametrize(
    ("status", "errors"),
    [
        (0, ""),
        (1, WHAT),
        (2, "error: no such file"),
        (2, f"{WHAT}\n{WHAT}"),
        (2, f"Traceback (most recent call last):\n{WHAT}"),
        (2, WHAT.replace("out/config.json", "out/.config.json.partial-12")),
    ],
)
def test_what_is_noticed(status, errors, tmp_path):
    full_disk.refused(Ended(WHAT), 2, tmp_path)
    with pytest.raises(Wrong):
        full_disk.refused(Ended(errors), status, tmp_path)


@pytest.mark.rare
def test_a_few_writes(tmp_path_factory, capsys):
    survived, tried = full_disk.run(tmp_path_factory.getbasetemp() / "kills", only=["emorl-export"], every=5)
    assert survived == tried >= 3
    assert "full_disk_survived" in capsys.readouterr().out

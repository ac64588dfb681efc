"""Lines from which paths are copied."""

import shlex

from rlae_jax import report


def test_a_long_path_is_one_line_and_comes_as_it_is(capsys):
    path = "/tmp/" + "/".join(f"[bold]directory-{i}" for i in range(40))
    report.say(f"the run is in {path}")
    assert capsys.readouterr().out == f"the run is in {path}\n"


def test_a_path_is_quoted_where_a_shell_needs_it(tmp_path):
    assert report.quoted("runs/demo") == "runs/demo"
    path = tmp_path / "my runs" / "it's"
    assert shlex.split(f"cat {report.quoted(path)}") == ["cat", str(path)]

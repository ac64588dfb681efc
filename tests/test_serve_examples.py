"""The examples of serving: their syntax, that `rlae-jax serve` takes their options, and that they let it stop."""

import configparser
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from rlae_jax.commands.serve import KEY_VARIABLE
from tests.helpers.command_lines import command_lines, parse
from tests.helpers.serving import MEMBERS, FakeEngine, answer, serving

SERVE = Path(__file__).resolve().parents[1] / "examples" / "serve"
SECONDS_TO_CLOSE = 10  # after the last answer, with room


def code(name):
    """A file's text without comments, and with lines that go on joined."""
    lines = [line for line in (SERVE / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    return re.sub(r"\\\n\s*", " ", "\n".join(lines))


def entry(name):
    """What a Dockerfile runs: the words from `rlae-jax` on, without it."""
    words = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", code(name), re.MULTILINE)[1])
    return words[words.index("rlae-jax") + 1 :]


def compose():
    service = yaml.safe_load(code("compose.yaml"))["services"]["rlae-jax"]
    return service, [*entry("Dockerfile"), *service["command"]]


def unit():
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # keys have capitals
    parser.read_string(code("rlae-jax.service"))
    return parser, shlex.split(parser["Service"]["ExecStart"])[1:]


def kubernetes():
    deployment, service = yaml.safe_load_all(code("kubernetes.yaml"))
    pod = deployment["spec"]["template"]["spec"]
    return deployment, service, pod, [*entry("Dockerfile.cuda"), *pod["containers"][0]["args"]]


@pytest.mark.parametrize("read", [compose, unit, kubernetes])
def test_the_program_accepts_the_options(read):
    *_, arguments = read()
    assert arguments[0] == "serve"
    assert len(parse(arguments)["model"].models) == 2


def test_the_program_accepts_the_readmes_options():
    text = (SERVE / "README.md").read_text()
    lines = [line for line in command_lines(text.replace("`", ";")) if line[1:]]
    behind_images = re.findall(r"docker run .* rlae-jax +(--models.*)", re.sub(r"\\\n\s*", " ", text))
    assert lines
    assert behind_images
    for arguments in [*lines, *([*entry("Dockerfile"), *shlex.split(words)] for words in behind_images)]:
        assert len(parse(arguments)["model"].models) == 2


def test_images_differ_in_the_device_alone():
    def steps(name):
        return [line for line in code(name).splitlines() if not re.match(r"ENV |RUN pip", line)]

    assert steps("Dockerfile") == steps("Dockerfile.cuda")
    for name, extras in (("Dockerfile", "[serve]"), ("Dockerfile.cuda", "[serve,cuda]")):
        assert f"'/source{extras}'" in code(name)
        for path in re.findall(r"^COPY (.*) \S+$", code(name), re.MULTILINE):
            assert all((SERVE.parents[1] / one).exists() for one in path.split())


def test_a_stop_lets_answers_end():
    service, arguments = compose()
    assert int(service["stop_grace_period"].removesuffix("s")) >= parse(arguments)["timeout"] + SECONDS_TO_CLOSE
    parser, arguments = unit()
    assert int(parser["Service"]["TimeoutStopSec"]) >= parse(arguments)["timeout"] + SECONDS_TO_CLOSE
    *_, pod, arguments = kubernetes()
    waits = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= waits + parse(arguments)["timeout"] + SECONDS_TO_CLOSE


def test_the_deployment_hangs_together():
    deployment, service, pod, arguments = kubernetes()
    (container,) = pod["containers"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    (port,) = container["ports"]
    assert port["containerPort"] == parse(arguments)["port"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert [variable["name"] for variable in container["env"]] == [KEY_VARIABLE]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_key_is_no_option():
    """Others see command lines."""
    for *_, arguments in (compose(), unit(), kubernetes()):
        assert "--api-key" not in arguments
    assert KEY_VARIABLE in compose()[0]["environment"]
    assert "EnvironmentFile" in unit()[0]["Service"]


def test_every_file_is_in_the_table():
    table = (SERVE / "README.md").read_text()
    files = {path.name for path in SERVE.iterdir() if path.is_file()}
    assert files - {"README.md"} == set(re.findall(r"\]\(([\w.-]+)\)", table))


def test_the_client(monkeypatch, capsys):
    pytest.importorskip("openai", reason="openai is not installed")
    with serving(FakeEngine()) as (url, *_):
        monkeypatch.setattr(sys, "argv", ["client.py", url, "once"])
        runpy.run_path(str(SERVE / "client.py"))
    text, *tokens = capsys.readouterr().out.splitlines()
    assert text == answer("once", 64)
    favoured = [line.split() for line in tokens]
    assert "".join(token.strip("'") for token, _ in favoured) == text
    assert {name for _, name in favoured} == set(MEMBERS)

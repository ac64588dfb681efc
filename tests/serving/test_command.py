"""`rlae-jax serve` as it is used: a process of its own, the real engine, `openai`'s client, and a signal at the end."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import numpy as np
import openai
import pytest

import rlae_jax as rj
from rlae_jax.commands import main as commands
from rlae_jax.commands import serve
from rlae_jax.evaluation import baseline_methods, evaluate
from rlae_jax.tasks import Examples, Task, get_reward
from tests.helpers.harness import TASKS, asked_and_told, copy_tasks, run
from tests.helpers.serving import eventually
from tests.helpers.tokenizers import byte_level

TEMPLATE = "{% for m in messages %}{{ m.role[:1] }}: {{ m.content }}, {% endfor %}a:"
MODELS = ["pair", "one", "two", "confidence"]
SECONDS = 240


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_lm):
    """Directories of two untrained members."""
    root, tokenizer = tmp_path_factory.mktemp("models"), byte_level([b" a", b"bc"])
    tokenizer.chat_template = TEMPLATE
    for k, name in enumerate(("one", "two")):
        fields = {"vocab": len(tokenizer), "layers": 1, "context": 96, "end_ids": (tokenizer.eos_token_id,)}
        make_lm(k, tokenizer=tokenizer, **fields).save(root / name)
    return [str(root / "one"), str(root / "two")]


@pytest.fixture(scope="module")
def ensemble(models):
    return rj.Ensemble([rj.load(model) for model in models])


@pytest.fixture(scope="module")
def client(models, tmp_path_factory):
    """A client of a server of these members, which is ended by SIGTERM with status 0."""
    log = (tmp_path_factory.mktemp("log") / "log").open("w+")
    options = ["--name", "pair", "--policy", "confidence", "--port", "0", "--slots", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rlae_jax", "serve", "--models", *models, *options],
        env=os.environ | {commands.CACHE_VARIABLE: "off", serve.KEY_VARIABLE: "sesame"},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        ready = process.stdout.readline()
        assert ready.startswith("ready at http://127.0.0.1:")
        assert process.stdout.readline() == f"models: {', '.join(MODELS)}\n"
        address = ready.split()[-3]
        with openai.OpenAI(base_url=address, api_key="sesame", max_retries=0, timeout=SECONDS) as client:
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout.read() == "stopped\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        log.seek(0)
        print(log.read())  # pytest shows it where a test fails
        log.close()


def test_answers_are_generates(client, ensemble):
    prompts = ["abc", "once upon a time"]
    options = {"max_new_tokens": 9, "temperature": 0.8, "seed": 5, "top_p": 0.9, "stop": ["q"]}
    for weights in ([0.5, 0.5], [1, 3]):
        asked = {"max_tokens": 9, "temperature": 0.8, "seed": 5, "top_p": 0.9, "stop": "q"}
        rlae = {"weights": weights}
        told = [client.completions.create(model="pair", prompt=p, **asked, extra_body={"rlae": rlae}) for p in prompts]
        expected = [ensemble.generate([p], weights, **options) for p in prompts]
        assert [one.choices[0].text for one in told] == [one.texts[0] for one in expected]
        assert [one.choices[0].finish_reason for one in told] == [one.finish_reasons[0] for one in expected]


@pytest.mark.parametrize(("model", "weights"), [("one", [1, 0]), ("two", [0, 1]), ("confidence", "confidence")])
def test_models_are_weights(client, ensemble, model, weights):
    fields = {"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    told = client.completions.create(**fields, extra_body={"rlae": {"attribution": True}}).choices[0]
    (expected,) = [ensemble.generate(["abc"], weights, max_new_tokens=8, scores=True)]
    assert told.text == expected.texts[0]
    n = len(told.logprobs.tokens)
    np.testing.assert_allclose(told.logprobs.token_logprobs, expected.scores[0, :n], atol=1e-5)
    members = [token["member_logprobs"] for token in told.rlae["tokens"]]
    np.testing.assert_allclose(members, expected.member_scores[0, :n], atol=1e-5)
    spans = [span["weights"] for span in told.rlae["spans"]]
    np.testing.assert_allclose(spans, expected.weights[0][: len(spans)], atol=1e-6)
    streamed = [c for chunk in client.completions.create(**fields, stream=True) for c in chunk.choices]
    assert "".join(choice.text for choice in streamed) == told.text
    scores = [score for choice in streamed for score in choice.logprobs.token_logprobs]
    np.testing.assert_allclose(scores, told.logprobs.token_logprobs, atol=1e-5)


def test_chat(client, ensemble):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    told = client.chat.completions.create(model="pair", messages=messages, temperature=0)
    prompt = "s: be kind, u: hello, a:"
    length = ensemble.lengths(ensemble.encode([prompt]))[0]
    expected = ensemble.generate([prompt], max_new_tokens=96 - length)
    assert told.choices[0].message.content == expected.texts[0]
    assert told.usage.prompt_tokens == length


def test_echoed_prompts_are_scored(client, ensemble):
    """As lm-eval asks for how likely an option is."""
    prompt, option = "abc", " defg"
    ids, (context,) = ensemble.tokenizer([prompt + option])["input_ids"], ensemble.lengths(ensemble.encode([prompt]))
    told = client.completions.create(model="pair", prompt=ids, max_tokens=1, temperature=0, echo=True, logprobs=1)
    logprobs = told.choices[0].logprobs
    ((expected,),) = ensemble.log_likelihoods([prompt], [[option]])
    assert sum(logprobs.token_logprobs[context:-1]) == pytest.approx(expected, abs=1e-4)
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == len(ids[0]) + 1
    for top, score in zip(logprobs.top_logprobs[1:], logprobs.token_logprobs[1:], strict=True):
        assert max(top.values()) >= score


def test_lm_eval(client, ensemble, models, tmp_path, monkeypatch):
    """Its local-completions has the numbers of the ensemble itself, which are `evaluate`'s."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    tasks = copy_tasks(tmp_path / "tasks")
    server = {"model": "pair", "base_url": f"{client.base_url}completions", "tokenizer": models[0], "max_length": 95}
    served = run("local-completions", tasks, model_args=server | {"tokenizer_backend": "huggingface"})
    for name in TASKS:
        prompts, options, letters, told = asked_and_told(served, name)
        np.testing.assert_allclose(told, ensemble.log_likelihoods(prompts, options), rtol=0, atol=1e-4)
        examples = Examples(prompts, letters, options)
        task = Task(name, {"train": examples, "test": examples}, get_reward("multiple_choice"), by_likelihood=True)
        score = evaluate(baseline_methods(ensemble, task, ["uniform"]), task)["methods"]["uniform"]["score"]
        assert score == pytest.approx(served["results"][name]["acc,none"])


def test_many_clients_of_whom_some_leave(client, ensemble):
    """What the others get is what `generate` writes, and nothing stays behind."""
    rng = np.random.default_rng(0)
    prompts = ["".join(rng.choice(list("abcdefgh "), rng.integers(3, 12))) for _ in range(24)]
    address = str(client.base_url)

    async def ask(i, http):
        fields = {
            "model": "pair",
            "prompt": prompts[i],
            "max_tokens": 20,
            "temperature": 1,
            "seed": i,
            "ignore_eos": True,
        }
        async with http.stream("POST", "completions", json=fields | {"stream": True}) as response:
            events = []
            async for line in response.aiter_lines():
                if line:
                    events.append(line.removeprefix("data: "))
                if i % 3 == 0 and events:
                    return None  # and closes the connection
        assert events.pop() == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    async def ask_all():
        headers = {"authorization": "Bearer sesame"}
        async with httpx.AsyncClient(base_url=address, headers=headers, timeout=SECONDS) as http:
            return await asyncio.gather(*(ask(i, http) for i in range(len(prompts))))

    options = {"max_new_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    for i, text in enumerate(asyncio.run(ask_all())):
        if i % 3:
            assert text == ensemble.generate([prompts[i]], seed=i, **options).texts[0]
    eventually(lambda: figures(client)["rlae_slots_in_use"] == figures(client)["rlae_queue"] == 0)


def figures(client):
    """The server's metrics without labels."""
    lines = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text.splitlines()
    return {
        name: float(value) for name, value in (line.split() for line in lines if line[0] != "#" and "{" not in line)
    }


def test_no_request_waits_for_a_compilation(client):
    before = figures(client)["rlae_compiles_total"]
    for n in (1, 7, 33, 80):
        fields = {"model": "pair", "prompt": "x" * n, "max_tokens": 96 - n - 1, "n": 1 + n % 3, "top_p": 1 / n}
        client.completions.create(**fields, logprobs=n % 5, seed=n)
    assert figures(client)["rlae_compiles_total"] == before


def test_what_is_wrong_with_a_call_is_told_in_a_line(monkeypatch, capsys, models):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlae-jax", "serve", "--models", *models, "--port", "0", *arguments])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "--timeout" in call("--timeout", "0")
    assert "--api-key" in call("--api-key", "")
    assert "nowhere" in call("--policy", "nowhere")
    assert "slots" in call("--slots", "0")
    assert "no.such.host.invalid" in call("--host", "no.such.host.invalid")


def test_only_the_server_needs_the_extra():
    package = Path(rj.__file__).parent
    texts = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
    of_extra = r"^ *(from|import) (starlette|uvicorn|prometheus_client|h11)"
    need = {name for name, text in texts.items() if re.search(of_extra, text, re.MULTILINE)}
    assert need == {"serving/app.py", "serving/metrics.py", "serving/server.py"}
    modules = "|".join(name.removesuffix(".py").replace("/", r"\.") for name in need)
    users = {name for name, text in texts.items() if re.search(f"rlae_jax.({modules}) import", text)}
    assert users - need == {"commands/serve.py"}


def test_without_the_extra_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rlae_jax.serving.app", None)
    monkeypatch.setattr(sys, "argv", ["rlae-jax", "serve", "--models", "any"])
    with pytest.raises(SystemExit):
        commands.main()
    assert "pip install 'rlae-jax[serve]'" in capsys.readouterr().err

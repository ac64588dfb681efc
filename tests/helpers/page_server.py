"""A server with the API that the page talks to and answers that are made up, so that tests of the page need no model:
what it writes is known, and it stops in the middle for as long as a test likes."""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rlae_jax.serving.html import PAGE, PAGE_HEADERS

WORDS = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily asked her friend for help.\n"
)


def written(members, *, seed=0, text=WORDS, span_length=4, weights=None):
    """An answer's spans and tokens as the API tells them: words of a text, with made-up numbers. Every so often all
    members are alike, or one of them cannot write the token."""
    rng = random.Random(seed)
    words = [word for line in text.splitlines(keepends=True) for word in line.replace(" ", "\0 ").split("\0")]
    tokens, spans = [], []
    for i, word in enumerate(words):
        if i % span_length == 0:
            drawn = [rng.gammavariate(0.7, 1) + 0.02 for _ in range(members)]
            given = [x / sum(drawn) for x in drawn] if weights is None else weights
            spans.append({"span": i // span_length, "start": i, "weights": given})
        by_member = [-rng.gammavariate(1.2, 1.3) for _ in range(members)]
        if rng.random() < 0.2:
            by_member = [by_member[0] - 0.01 * k for k in range(members)]
        elif rng.random() < 0.1:
            by_member[rng.randrange(members)] = None
        span = spans[-1]["span"]
        tokens.append({"text": word, "span": span, "logprob": -rng.random(), "member_logprobs": by_member})
    return {"spans": spans, "tokens": tokens}


class PageServer(ThreadingHTTPServer):
    """Serves the page and made-up answers at `url`. A prompt says what happens:

    "wait"  the answer stops after its eighth token until `go` is set;   "busy"  429;
    "break" the connection ends there;                                   "fault" an error there;
    anything else is answered at once.
    """

    daemon_threads = True

    def __init__(self, members=("storyteller", "poet"), *, chat=True, key=None, policies=("runs/agent",), text=WORDS):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.members, self.chat, self.key, self.text, self.policies = list(members), chat, key, text, policies
        self.asked = []  # the bodies, as they came
        self.go, self.left = threading.Event(), threading.Event()  # `left`: a client closed its connection
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def models(self):
        facts = {"members": self.members, "fusion": "linear", "span_length": 4, "context": 512, "chat": self.chat}
        kinds = [("ensemble", "pair"), *(("member", m) for m in self.members), *(("policy", p) for p in self.policies)]
        return [{"id": name, "object": "model", "rlae": {"kind": kind, **facts}} for kind, name in kinds]

    def answer(self, request):
        """What is written: an agent chooses weights, members are alone, else they are as asked for or equal."""
        k, model = len(self.members), request["model"]
        weights = request["rlae"].get("weights", [1 / k] * k)
        if model in self.policies:
            weights = None
        elif model in self.members:
            weights = [float(name == model) for name in self.members]
        return written(k, seed=len(model), text=self.text, weights=weights)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.go.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, status, value):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status, message):
        self._json(status, {"error": {"message": message, "type": "error", "param": None, "code": None}})

    def _allowed(self):
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self._fail(401, "no such key")
        return False

    def do_GET(self):
        if self.path in PAGE:
            body, kind = PAGE[self.path]
            self._send(200, body, {**PAGE_HEADERS, "Content-Type": kind})
        elif self.path == "/v1/models" and self._allowed():
            self._json(200, {"object": "list", "data": self.server.models()})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, request))
        if not self._allowed():
            return
        chat = self.path == "/v1/chat/completions"
        prompt = request["messages"][0]["content"] if chat else request["prompt"]
        if prompt == "busy":
            self._fail(429, "64 requests wait already <b>")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(self.server.answer(request), prompt, chat)
        except OSError:
            self.server.left.set()

    def _stream(self, answer, prompt, chat):
        spans = {span["start"]: span for span in answer["spans"]}
        tokens = answer["tokens"]
        for i, token in enumerate(tokens):
            if i == 8 and prompt == "break":
                return
            if i == 8 and prompt == "fault":
                self._event({"error": {"message": "the device is gone", "type": "server_error"}})
                return
            while i == 8 and prompt == "wait" and not self.server.go.wait(0.02):
                self.wfile.write(b": still here\n\n")  # fails once the client has left
            choice = {"index": 0, "finish_reason": "length" if i + 1 == len(tokens) else None}
            choice["rlae"] = {"spans": [spans[i]] if i in spans else [], "tokens": [token]}
            choice |= {"delta": {"content": token["text"]}} if chat else {"text": token["text"]}
            self._event({"choices": [choice]})
        self._event("[DONE]")

    def _event(self, data):
        self.wfile.write(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode())

"""Asks a server of `rlae-jax serve`; prints the text, and each token with the member that favoured it most.

python examples/serve/client.py http://127.0.0.1:8000 "Once upon a time"
"""

import os
import sys
from typing import Any

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key=os.environ.get("RLAE_JAX_API_KEY", "none"))
model: Any = client.models.list().data[0]  # the ensemble; its members and policies come after it
answer: Any = client.completions.create(
    model=model.id, prompt=sys.argv[2], max_tokens=64, extra_body={"rlae": {"attribution": True}}
)
print(answer.choices[0].text)
for token in answer.choices[0].rlae["tokens"]:
    scores = [-float("inf") if score is None else score for score in token["member_logprobs"]]
    print(f"{token['text']!r:>16}  {model.rlae['members'][scores.index(max(scores))]}")

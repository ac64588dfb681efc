"""Several language models as one: fusion operators, sampling and the compiled decoding loop. Knows nothing of RL."""

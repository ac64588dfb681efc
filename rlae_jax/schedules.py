"""Learning rates over the steps of a training run."""

import optax


def learning_rate(schedule: str, rate: float, warmup: int, steps: int) -> optax.Schedule:
    """Step -> learning rate, which after `warmup` steps of linear growth stays at `rate` ("constant") or falls to 0 at
    step `steps` ("linear", "cosine"). The first step after the warm-up is the first at the full rate."""
    falling = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, falling),
        "cosine": optax.cosine_decay_schedule(rate, falling),
    }[schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(rate / (warmup + 1), rate, warmup), after], [warmup])

"""The tests. The package's annotations, shapes of arrays among them, are checked at every call while they run."""

from jaxtyping import install_import_hook

import tests.helpers.typechecker

# All but what users call with anything, which answers mistakes in words: `Ensemble`, its options and weights, commands.
CHECKED = (
    "rlae_jax.emorl.fine_tune",
    "rlae_jax.emorl.fused",
    "rlae_jax.emorl.losses",
    "rlae_jax.evaluation",
    "rlae_jax.files",
    "rlae_jax.fusion.codec",
    "rlae_jax.fusion.decode",
    "rlae_jax.fusion.generation",
    "rlae_jax.fusion.lockstep",
    "rlae_jax.fusion.members",
    "rlae_jax.fusion.operators",
    "rlae_jax.fusion.policy",
    "rlae_jax.fusion.programs",
    "rlae_jax.fusion.prompts",
    "rlae_jax.fusion.ragged",
    "rlae_jax.fusion.reading",
    "rlae_jax.fusion.search",
    "rlae_jax.fusion.state",
    "rlae_jax.fusion.vocabulary",
    "rlae_jax.models",
    "rlae_jax.ppo",
    "rlae_jax.report",
    "rlae_jax.runs",
    "rlae_jax.statistics",
    "rlae_jax.tasks",
)
# Before anything of the package is imported.
install_import_hook(CHECKED, f"{tests.helpers.typechecker.__name__}.check")

"""The tests. The package's annotations, shapes of arrays among them, are checked at every call while they run."""

from jaxtyping import install_import_hook

import tests.helpers.typechecker

CHECKED = (
    "rlae_jax.files",
    "rlae_jax.fusion.operators",
    "rlae_jax.fusion.search",
    "rlae_jax.fusion.vocabulary",
    "rlae_jax.models",
    "rlae_jax.ppo.dirichlet",
    "rlae_jax.ppo.objective",
    "rlae_jax.report",
    "rlae_jax.runs",
    "rlae_jax.statistics",
    "rlae_jax.tasks",
)
# Before anything of the package is imported.
install_import_hook(CHECKED, f"{tests.helpers.typechecker.__name__}.check")

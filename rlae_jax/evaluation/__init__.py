"""Methods on the same prompts: answers, scores under objectives, intervals, tests. One engine for RLAE and EMORL."""

from rlae_jax.evaluation.agents import load_agents as load_agents
from rlae_jax.evaluation.agents import router_config as router_config
from rlae_jax.evaluation.baselines import baseline_methods as baseline_methods
from rlae_jax.evaluation.baselines import check_names as check_names
from rlae_jax.evaluation.engine import evaluate as evaluate
from rlae_jax.evaluation.methods import Method as Method
from rlae_jax.evaluation.results import join_results as join_results
from rlae_jax.evaluation.texts import evaluate_rules as evaluate_rules
from rlae_jax.evaluation.texts import evaluate_texts as evaluate_texts
from rlae_jax.evaluation.transfer import leave_one_out as leave_one_out
from rlae_jax.evaluation.transfer import transfer_matrix as transfer_matrix

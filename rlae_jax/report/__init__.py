"""What people look at: the terminal, progress, tables, pictures, and the environment of a run.

Other code says `from rlae_jax import report` and takes everything from here. Nothing here knows what an ensemble or an
agent is: what is shown comes as numbers, names and rows of JSON.
"""

from rlae_jax.report.machine import environment as environment
from rlae_jax.report.pictures import COLOURS as COLOURS
from rlae_jax.report.pictures import contributions as contributions
from rlae_jax.report.pictures import curves_with_bands as curves_with_bands
from rlae_jax.report.pictures import learning_curve as learning_curve
from rlae_jax.report.pictures import parallel_coordinates as parallel_coordinates
from rlae_jax.report.pictures import scores_chart as scores_chart
from rlae_jax.report.pictures import scores_over as scores_over
from rlae_jax.report.pictures import transfer_map as transfer_map
from rlae_jax.report.pictures import weight_triangle as weight_triangle
from rlae_jax.report.pictures import weights_by_skill as weights_by_skill
from rlae_jax.report.progress_bar import Update as Update
from rlae_jax.report.progress_bar import progress as progress
from rlae_jax.report.progress_bar import training_progress as training_progress
from rlae_jax.report.progress_bar import waiting as waiting
from rlae_jax.report.tables import adapters_table as adapters_table
from rlae_jax.report.tables import differences_table as differences_table
from rlae_jax.report.tables import markdown_table as markdown_table
from rlae_jax.report.tables import objectives_table as objectives_table
from rlae_jax.report.tables import results_table as results_table
from rlae_jax.report.terminal import console as console
from rlae_jax.report.terminal import quoted as quoted
from rlae_jax.report.terminal import say as say

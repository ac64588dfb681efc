"""What a command leaves behind: the run directory, its checkpoints and metrics, how it is stopped and resumed."""

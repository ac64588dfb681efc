"""`python -m rlae_jax` is `rlae-jax`."""

from rlae_jax.commands.entry import main

if __name__ == "__main__":
    main()

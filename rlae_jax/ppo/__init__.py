"""The span MDP: weight agents, advantages, PPO, and the training loop around the compiled decoding loop."""

"""The training loop of all methods: updates, guard, checkpoints, polite stops."""

"""The training loop, its steps, optimizers and logs."""

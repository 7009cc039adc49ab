"""One real training step on tensors without values, held against the plan."""

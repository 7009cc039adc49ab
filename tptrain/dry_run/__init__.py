"""What a plan says, seen in a run: calls and bytes of the process groups, tensors as they come and go, one step without values."""

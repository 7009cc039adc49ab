"""What a plan says, seen in a run: tensors as they come and go."""

"""What a config asks for, worked out without running it."""

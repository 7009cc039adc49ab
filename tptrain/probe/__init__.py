"""What this machine can do, measured for a plan."""

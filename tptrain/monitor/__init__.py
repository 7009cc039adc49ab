"""What a run tells: its status, its metrics, what the terminal shows, and W&B. Only rank 0 uses this room."""

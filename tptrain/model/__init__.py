"""A stage of a GPT, built from tensor-parallel layers."""

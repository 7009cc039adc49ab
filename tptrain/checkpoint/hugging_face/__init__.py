"""Models in the form that Hugging Face's `transformers` saves and loads; it is not needed for either way."""

"""What a run would read, counted without training: documents, tokens, vocabulary, samples; the verb `data`."""

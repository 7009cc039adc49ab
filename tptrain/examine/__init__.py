"""The verb `eval`, around its ranks: from a run folder, data and questions to a job, and from what it measured to tables and files."""

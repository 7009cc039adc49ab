"""The verb `slurm`: from a training's config to a script that sbatch takes."""

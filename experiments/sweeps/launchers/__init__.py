"""Where the tasks of a sweep are done: here, in processes, in a SLURM array, on a Ray cluster."""

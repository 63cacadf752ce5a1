"""Drawing the jobs of a run, in this process or on a Ray cluster."""

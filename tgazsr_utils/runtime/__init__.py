"""Runs that survive: weights, checkpoints, whole files, several processes, names of what a result depends on."""

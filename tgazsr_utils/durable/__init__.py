"""Runs that survive: weights, checkpoints, whole files, several processes, and the names of what a result depends on."""

"""A run that is killed or that something fails in, and goes on from its last checkpoint."""

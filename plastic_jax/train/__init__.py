"""Training: the core for one trial, the trial axis around it, and the host loop that deals trials to slots."""

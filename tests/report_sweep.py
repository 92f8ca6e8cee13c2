"""A made-up sweep for the tests of figures and page."""

from synthetic import learning_curves

from plastic_jax.results import summaries

LENGTHS = (0, 1, 10, 40)


def made():
    """Three optimisers, four lengths, five seeds: table, summary, setting."""
    table, setting = learning_curves(LENGTHS, ("adam", "rmsprop", "sgd"), 5, tuning_epochs=30, metric_epochs=10)
    return table, summaries.summary(table, setting), setting

"""Building blocks that every Hydra app of the environment can name: callbacks, units, score, budget, rule, effect."""

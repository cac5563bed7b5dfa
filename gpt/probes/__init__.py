"""Looking at norms: statistics of a step, what a model lets tokens see, cards."""

"""One client's round on the live model: cut the sub-model, train, measure."""

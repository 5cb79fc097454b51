"""The one door to a model framework: the facts of a model and the protocol of a live one."""

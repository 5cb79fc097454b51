"""A stock transformers model in place: its experts run on fedmoe, masked, cut to fewer, put back together."""

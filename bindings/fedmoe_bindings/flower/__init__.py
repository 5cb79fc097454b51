"""The Flower binding: a run of fedmoe as a Flower app, for clients whose data may not move."""

"""How much each expert matters, and the exact choice of experts under a budget."""

"""The federated layer: budgets, plans, clients, exact aggregation and the simulator."""

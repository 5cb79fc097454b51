"""What server and client tell each other in a round: plan, result, profile, update."""

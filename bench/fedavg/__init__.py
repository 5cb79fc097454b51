"""The job of other federated simulators, run by each of them and by fedmoe: small plain models, nothing else."""

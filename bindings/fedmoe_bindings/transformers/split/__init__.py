"""A dense transformers checkpoint becomes a Mixture of Experts that computes the same function when all experts run."""

"""What the loop of rounds needs of a run, and the two kinds of run that give it: MoE language models, plain modules."""

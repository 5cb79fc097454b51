"""Every kernel compiled for GPUs that are not here, its machine code read, and the table of both."""

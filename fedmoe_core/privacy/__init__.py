"""What keeps a client's part of the sums private: bounded, noised and accounted for."""

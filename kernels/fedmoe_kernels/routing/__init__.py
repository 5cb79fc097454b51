"""From router logits to rows: who serves each token, with what weight, and what that tells of the experts."""

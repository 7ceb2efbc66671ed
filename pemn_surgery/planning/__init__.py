"""What will happen to every tensor of a model, and why. A plan touches nothing."""

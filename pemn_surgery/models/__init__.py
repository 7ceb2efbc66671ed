"""What a model does with its weights: a forward and its graphs are followed, never changed."""

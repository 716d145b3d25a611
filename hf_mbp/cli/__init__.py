"""What the scripts share: reading a recipe, loading model and data, training, measuring, plotting."""

"""What a model is trained to do; one file an objective."""

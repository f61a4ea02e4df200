"""What happens around a training step: one small callback a file."""

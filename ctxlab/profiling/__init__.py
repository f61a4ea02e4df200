"""What a training step costs: measured."""

READY = "ready"  # what a point that takes turns with others says when it can go on

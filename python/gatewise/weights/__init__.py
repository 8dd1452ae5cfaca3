"""What the weights of a layer are: names, shapes, functions, and snapshots that never change."""

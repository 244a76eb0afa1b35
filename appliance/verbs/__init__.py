"""The verbs of the command line, grouped by what they work on: the model, builds, nodes, the host."""

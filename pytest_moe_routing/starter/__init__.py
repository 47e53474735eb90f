"""What `moe-routing init` writes next to a model; `{directory}` and `{model}` are filled in."""

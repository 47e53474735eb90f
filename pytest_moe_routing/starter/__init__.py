"""What `moe-routing init` writes beside a model; `{directory}` and `{model}` are filled in."""

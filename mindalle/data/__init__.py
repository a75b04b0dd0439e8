"""Training data: image shards, the code cache, and the Lightning data modules over them."""

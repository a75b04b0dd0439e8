"""How fast a model is: shapes, the straightforward decode to compare with, and what the machine can do."""

"""The report of a model: what was measured, kept as data, and the page of figures that is drawn from it."""

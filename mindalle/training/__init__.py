"""Lightning modules that train the parts of a model, and the callbacks around them."""

"""Training of draft heads for the models that are served."""

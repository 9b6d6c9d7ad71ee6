"""Reference systems over the modules."""

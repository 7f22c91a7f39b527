"""How a model reaches the store: files of a folder, of the hub, or of a Python package."""

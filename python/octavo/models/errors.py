"""What goes wrong between a model's name and its weights in memory."""


class ModelLoadError(ValueError):
    """The model cannot be loaded. The message is one line and names the file and what is wrong."""

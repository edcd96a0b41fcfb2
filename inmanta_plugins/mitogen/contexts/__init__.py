"""From the model to a serialized context, and what such a dict may hold."""

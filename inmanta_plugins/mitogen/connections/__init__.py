"""From a serialized context to a connection: hub, links, interpreters and diagnosis."""

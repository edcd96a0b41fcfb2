"""What a host may send, ask for and log."""

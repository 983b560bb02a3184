"""What a call carries through the server: its context and its ledger. Devices may import it."""

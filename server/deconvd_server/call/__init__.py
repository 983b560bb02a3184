"""What travels with a call: its context and its ledger. Devices may know it."""

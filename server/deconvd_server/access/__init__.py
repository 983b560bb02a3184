"""Who may call: tokens, certificates, and the identity that they prove."""

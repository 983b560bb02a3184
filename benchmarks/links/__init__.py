"""How calls fare on links that are slow or long."""

"""What training does where: computes only, writes nothing. `effect` holds the G-effect."""

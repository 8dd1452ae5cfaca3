"""What runs in the core: networks, and what holds their state."""

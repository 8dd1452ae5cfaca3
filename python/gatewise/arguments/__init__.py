"""What users hand over becomes what the core can take, or an error says which argument is wrong."""

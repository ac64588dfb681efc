"""What happens when a disk is full, a place is no place, a signal comes."""

"""The commands of EMORL, a file each."""

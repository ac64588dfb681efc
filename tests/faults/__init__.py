"""What may go wrong around the package: disks that are full, places that are none, processes that are killed, bytes
that are not what they should be."""

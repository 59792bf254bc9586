"""Files on a host where its hypervisor looks for them, and their upkeep."""

"""From the bytes of a message to what it says of a resource."""

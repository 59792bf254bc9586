"""An image wanted on hosts: which, in what order, when, how fast, and how far it is."""

"""hostler precache: big images are on the compute hosts before anyone boots from them."""

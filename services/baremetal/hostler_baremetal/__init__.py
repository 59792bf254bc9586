"""hostler baremetal: one proxy for thousands of BMCs."""

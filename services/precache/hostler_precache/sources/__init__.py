"""Where images are listed and where their bytes come from."""

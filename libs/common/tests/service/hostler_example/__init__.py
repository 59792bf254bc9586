"""The package of the service that these tests run: its migrations and its templates."""

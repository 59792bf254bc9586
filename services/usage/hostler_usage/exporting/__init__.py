"""Whole tables that leave the service, and reports made of them."""

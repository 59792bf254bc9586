"""The story that `make demo` tells, one module a service."""

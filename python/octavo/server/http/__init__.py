"""The HTTP layer: connections, access, limits, bodies, the application."""

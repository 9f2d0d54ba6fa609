"""HTTP as such: connections, access, limits, the app."""

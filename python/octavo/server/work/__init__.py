"""From a checked request to its answer, whatever the API."""

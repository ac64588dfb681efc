"""The service: an engine that answers requests as they come, its HTTP interface, and the page that shows who wrote
what."""

"""The service: an engine that answers many requests at once, its HTTP interface, and the page that
shows who wrote what."""

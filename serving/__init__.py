"""The service: engine, hosted proxy, HTTP, page, command line."""

"""The HTTP server with OpenAI's routes. Only this package imports web libraries."""
